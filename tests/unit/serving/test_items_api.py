"""Listing, adding, replacing, deleting and showing pictures of the gallery."""

import base64
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.engine.admission import Admission
from serving.engine.query_engine import QueryEngine
from serving.schemas.items import ItemAnswer, ItemsAnswer
from serving.settings import ServingSettings
from tests.unit.serving.small_index import LOCAL, NUM_PICTURES, SmallIndex, draw


def picture(colour: str = "navy", *, side: int = 96) -> bytes:
    file = io.BytesIO()
    draw("disc", colour, side=side).save(file, format="PNG")
    return file.getvalue()


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def nearest(client: TestClient, content: bytes) -> int:
    hits = client.post("/v1/search", files={"image": content}, data={"k": 1, "exact": "true"}).json()["hits"]
    return hits[0]["id"]


def ids(answer: httpx2.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["items"]]


READS = {
    "/v1/items": "/v1/items",
    "/v1/items?sample=3": "/v1/items",
    "/v1/items/3": "/v1/items/{id}",
    "/v1/items/3/image": "/v1/items/{id}/image",
    "/v1/items/3/image?size=thumbnail": "/v1/items/{id}/image",
    "/v1/indexes": "/v1/indexes",
}


class TestLoad:
    def test_one_browser_may_show_200_thumbnails_at_once(self, client: TestClient) -> None:
        with ThreadPoolExecutor(6) as connections:
            addresses = [f"/v1/items/{n % NUM_PICTURES}/image?size=thumbnail" for n in range(200)]
            answers = list(connections.map(client.get, addresses))
        assert {answer.status_code for answer in answers} == {200}

    @pytest.mark.parametrize("address", READS)
    def test_beyond_the_bound_it_is_refused_as_documented(
        self, client: TestClient, engine: QueryEngine, monkeypatch: pytest.MonkeyPatch, address: str
    ) -> None:
        room = Admission("lists and pictures", most_inside=1, most_seconds=math.inf)
        monkeypatch.setattr(engine, "_reads", room)
        assert client.get(address).status_code == 200
        with room.entering():
            answer = client.get(address)
        assert code(answer) == (429, "server.overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        documented = client.get("/openapi.json").json()["paths"][READS[address]]["get"]["responses"]["429"]
        assert "server.overloaded" in documented["content"]["application/problem+json"]["examples"]

    def test_so_are_changes(self, writing_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        client, room = writing_client, Admission("changes", most_inside=1, most_seconds=math.inf)
        monkeypatch.setattr(client.app.state.engine, "_writes", room)  # type: ignore[attr-defined]
        routes = client.get("/openapi.json").json()["paths"]
        vector = {"json": {"vector": [1.0] * 512}}
        changes = (("post", "/v1/items", vector), ("put", "/v1/items/{id}", vector), ("delete", "/v1/items/{id}", {}))
        for method, route, body in changes:
            with room.entering():
                answer = client.request(method, route.format(id=7), **body)
            assert code(answer) == (429, "server.overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            documented = routes[route][method]["responses"]["429"]
            assert "server.overloaded" in documented["content"]["application/problem+json"]["examples"]


class TestLists:
    @pytest.mark.parametrize("limit", [1, 7, 24, 200])
    def test_pages_hold_everything_once_in_order(self, client: TestClient, limit: int) -> None:
        listed: list[int] = []
        after: int | None = -1
        while after is not None:
            page = client.get("/v1/items", params={"after_id": after, "limit": limit})
            assert ItemsAnswer.model_validate(page.json(), strict=True).model_dump() == page.json()
            assert len(ids(page)) <= limit
            listed += ids(page)
            after = page.json()["next_after_id"]
        assert listed == list(range(NUM_PICTURES))

    def test_without_parameters_are_the_first(self, client: TestClient) -> None:
        assert ids(client.get("/v1/items")) == list(range(24))

    def test_are_kept_to_a_filter(self, client: TestClient) -> None:
        condition = json.dumps({"column": "class_name", "equals": "ring"})
        page = client.get("/v1/items", params={"filter": condition, "limit": 4})
        rest = client.get("/v1/items", params={"filter": condition, "after_id": page.json()["next_after_id"]})
        assert {item["class_name"] for item in (*page.json()["items"], *rest.json()["items"])} == {"ring"}
        assert (len(ids(page)), len(ids(rest)), rest.json()["next_after_id"]) == (4, 2, None)

    @pytest.mark.parametrize(
        ("address", "refusal"),
        [
            ("limit=0", "request.invalid"),
            ("limit=201", "request.invalid"),
            ("after_id=-2", "request.invalid"),
            ("filter=x", "request.invalid"),
            ("filter={}", "filter.invalid"),
            ('filter={"column": "mood", "equals": 1}', "filter.invalid"),
            ("seed=3", "request.invalid"),
            ("sample=3&limit=3", "request.invalid"),
            ("sample=3&after_id=3", "request.invalid"),
        ],
    )
    def test_that_cannot_be_meant_are_refused(self, client: TestClient, address: str, refusal: str) -> None:
        assert code(client.get(f"/v1/items?{address}")) == (422, refusal)


class TestAdditions:
    def test_are_found_by_what_was_sent_and_shown_as_it_was(self, writing_client: TestClient) -> None:
        client, added = writing_client, []
        for request in (
            {"files": {"image": ("a.png", picture("navy"))}, "data": {"metadata": '{"class_name": "disc"}'}},
            {"json": {"image": base64.b64encode(picture("lime")).decode(), "metadata": {"key": "lime"}}},
            {"files": {"image": ("a.png", picture("brown"))}, "data": {"id": 500}},
        ):
            answer = client.post("/v1/items", **request)
            assert answer.status_code == 201, answer.text
            item = answer.json()
            assert ItemAnswer.model_validate(item, strict=True).model_dump() == item
            assert answer.headers["location"] == f"/v1/items/{item['id']}"
            assert client.get(answer.headers["location"]).json() == item
            added.append(item)
        assert [item["id"] for item in added] == [24, 25, 500]
        assert [item["key"] for item in added] == ["24", "lime", "500"]
        assert added[0]["class_name"] == "disc"
        assert (added[0]["width"], added[0]["height"]) == (96, 96)
        for item, colour in zip(added, ("navy", "lime", "brown"), strict=True):
            assert nearest(client, picture(colour)) == item["id"]
            shown = client.get(item["image_url"])
            assert (shown.content, shown.headers["content-type"]) == (picture(colour), "image/png")
        assert ids(client.get("/v1/items?after_id=23")) == [24, 25, 500]

    def test_are_still_there_when_the_server_starts_again(self, writing_client: TestClient) -> None:
        item = writing_client.post("/v1/items", files={"image": picture()}).json()
        folder = writing_client.app.state.engine.index.folder.parent  # type: ignore[attr-defined]
        engine = QueryEngine.open(folder)
        with TestClient(create_app(engine, ServingSettings(index=folder)), base_url=LOCAL) as again:
            assert nearest(again, picture()) == item["id"]
            assert code(again.post("/v1/items", files={"image": picture()})) == (403, "writes.off")
            assert code(again.delete("/v1/items/1")) == (403, "writes.off")

    def test_of_vectors_have_nothing_to_show(self, writing_client: TestClient) -> None:
        vector = np.random.default_rng(0).normal(size=512).astype("<f4")
        answer = writing_client.post("/v1/items", json={"vector": base64.b64encode(vector.tobytes()).decode()})
        assert (answer.status_code, answer.json()["image_url"]) == (201, None)
        shown = writing_client.get(f"/v1/items/{answer.json()['id']}/image")
        assert code(shown) == (404, "pictures.unavailable")
        assert "it is a vector alone" in shown.json()["detail"]
        hits = writing_client.post("/v1/search", json={"vector": vector.tolist(), "k": 1}).json()["hits"]
        assert hits[0]["id"] == answer.json()["id"]

    def test_take_no_id_that_is_in_use_unless_they_replace(self, writing_client: TestClient) -> None:
        client = writing_client
        assert code(client.post("/v1/items", files={"image": picture()}, data={"id": 3})) == (409, "item.exists")
        replaced = client.post("/v1/items", files={"image": picture()}, data={"id": 3, "replace": "true"})
        assert (replaced.status_code, nearest(client, picture())) == (200, 3)
        new = client.post("/v1/items", files={"image": picture("lime")}, data={"id": 77, "replace": "true"})
        assert (new.status_code, nearest(client, picture("lime"))) == (201, 77)

    @pytest.mark.parametrize(
        ("request_", "refusal"),
        [
            ({"json": {}}, (422, "request.invalid")),
            ({"json": {"image": "AAAA", "vector": [1.0]}}, (422, "request.invalid")),
            ({"json": {"vector": [1.0]}}, (422, "vector.wrong_dim")),
            ({"json": {"vector": [0.0] * 512}}, (422, "vector.no_direction")),
            ({"json": {"vector": [1.0] * 512, "metadata": {"mood": 1}}}, (422, "item.unfit")),
            ({"json": {"vector": [1.0] * 512, "metadata": {"width": "wide"}}}, (422, "item.unfit")),
            ({"json": {"vector": [1.0] * 512, "replace": True}}, (422, "request.invalid")),
            ({"json": {"vector": [1.0] * 512, "id": 2**63 - 1}}, (422, "item.unfit")),
            ({"json": {"vector": [1.0] * 512, "id": -1}}, (422, "request.invalid")),
            ({"json": {"vector": [1.0] * 512, "k": 3}}, (422, "request.invalid")),
            ({"files": {"image": b"no picture"}}, (415, "image.not_an_image")),
            ({"files": {"image": picture()[:-40]}}, (422, "image.truncated")),
            ({"files": {"image": b""}}, (422, "image.empty")),
            ({"files": {"picture": picture()}}, (422, "request.invalid")),
            ({"files": {"image": picture()}, "data": {"metadata": "{"}}, (422, "request.invalid")),
            ({"files": {"image": picture()}, "data": {"metadata": "[1]"}}, (422, "request.invalid")),
            ({"files": {"image": picture()}, "data": {"vector": "[1]"}}, (422, "request.invalid")),
            ({"content": b"x", "headers": {"content-type": "image/png"}}, (415, "body.unsupported_type")),
        ],
    )
    def test_that_do_not_fit_are_refused_and_change_nothing(
        self, writing_client: TestClient, request_: dict[str, Any], refusal: tuple[int, str]
    ) -> None:
        assert code(writing_client.post("/v1/items", **request_)) == refusal
        assert ids(writing_client.get("/v1/items?after_id=22")) == [23]


class TestReplacements:
    def test_put_another_picture_in_the_place_of_one(self, writing_client: TestClient) -> None:
        client = writing_client
        before = client.get("/v1/items/5").json()
        put = client.put("/v1/items/5", files={"image": picture()}, data={"metadata": '{"key": "new"}'})
        assert (put.status_code, put.json()["key"], put.json()["class_name"]) == (200, "new", None)
        assert nearest(client, picture()) == 5
        assert client.get(put.json()["image_url"]).content == picture()
        key = client.get("/v1/items/6").json()["key"]
        kept = client.put("/v1/items/6", json={"image": base64.b64encode(picture("lime", side=50)).decode()}).json()
        assert (kept["width"], kept["height"], kept["class_name"]) == (50, 50, "ring")
        assert (kept["id"], kept["key"]) == (6, key)
        # What the old picture was shown at must not go on showing it from caches.
        assert client.get(before["image_url"]).headers["cache-control"] == "no-cache"

    def test_of_what_was_added_are_shown_at_another_address(self, writing_client: TestClient) -> None:
        client = writing_client
        added = client.post("/v1/items", files={"image": picture()}).json()
        assert client.get(f"/v1/items/{added['id']}").json() == added
        tag = client.get(added["image_url"]).headers["etag"]
        replaced = client.put(f"/v1/items/{added['id']}", files={"image": picture("lime")}).json()
        assert replaced["image_url"] != added["image_url"]
        again = client.get(replaced["image_url"], headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (200, picture("lime"))

    def test_by_a_vector_leave_no_picture_of_another(self, writing_client: TestClient) -> None:
        client, dim = writing_client, writing_client.get("/v1/info").json()["dim"]
        before = client.get("/v1/items/5").json()
        put = client.put("/v1/items/5", json={"vector": [1.0] * dim})
        assert (put.status_code, put.json()["key"], put.json()["image_url"]) == (200, before["key"], None)
        for _ in range(2):  # before and after a compaction
            assert code(client.get("/v1/items/5/image")) == (404, "pictures.unavailable")
            hits = client.post("/v1/search", json={"vector": [1.0] * dim, "k": 2}).json()["hits"]
            assert [hit["image_url"] is None for hit in hits] == [True, False]
            assert client.post("/v1/indexes:compact").status_code == 200
        assert client.put("/v1/items/5", files={"image": picture()}).json()["image_url"] is not None
        assert client.get("/v1/items/5/image").content == picture()

    def test_of_what_is_not_there_are_refused(self, writing_client: TestClient) -> None:
        assert code(writing_client.put("/v1/items/99", files={"image": picture()})) == (404, "item.unknown")
        assert code(writing_client.put("/v1/items/5", json={"vector": [1.0], "id": 5})) == (422, "request.invalid")


class TestDeletions:
    def test_are_in_force_at_once(self, writing_client: TestClient) -> None:
        client = writing_client
        gone = client.delete("/v1/items/7")
        assert (gone.status_code, gone.content) == (204, b"")
        assert 7 not in [hit["id"] for hit in client.post("/v1/search", json={"id": 6, "k": 30}).json()["hits"]]
        assert 7 not in ids(client.get("/v1/items?limit=50"))
        for answer in (client.get("/v1/items/7"), client.delete("/v1/items/7"), client.get("/v1/items/7/image")):
            assert code(answer) == (404, "item.unknown")
        assert code(client.post("/v1/search", json={"id": 7})) == (404, "item.unknown")
        assert client.get("/v1/info").json()["num_vectors"] == NUM_PICTURES - 1


class TestPictures:
    def test_thumbnails_are_small_jpegs_of_the_same(self, writing_client: TestClient) -> None:
        client = writing_client
        item = client.post("/v1/items", files={"image": picture(side=1000)}).json()
        answer = client.get(f"{item['image_url']}&size=thumbnail")
        assert answer.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content)) as shown, Image.open(io.BytesIO(picture(side=320))) as expected:
            assert shown.size == (320, 320)
            difference = np.asarray(shown.convert("RGB"), np.int64) - np.asarray(expected.convert("RGB"), np.int64)
        assert np.abs(difference).mean() < 3
        small = client.get("/v1/items/0/image?size=thumbnail")
        with Image.open(io.BytesIO(small.content)) as shown:
            assert shown.size == (96, 96)
        assert code(client.get("/v1/items/0/image?size=huge")) == (422, "request.invalid")

    def test_a_copy_that_is_still_right_is_not_sent_again(self, client: TestClient) -> None:
        address = client.get("/v1/items/3").json()["image_url"]
        for path in (address, f"{address}&size=thumbnail", "/v1/items/3/image"):
            first = client.get(path)
            is_for_ever = "immutable" in first.headers["cache-control"]
            assert is_for_ever == (path != "/v1/items/3/image")
            again = client.get(path, headers={"if-none-match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content


def test_a_website_cannot_make_a_browser_change_the_gallery(
    writing_client: TestClient, small_index: SmallIndex
) -> None:
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert code(writing_client.delete("/v1/items/1", headers=headers)) == (403, "origin.not_allowed")
        assert code(writing_client.post("/v1/indexes:rollback", headers=headers)) == (403, "origin.not_allowed")
    assert writing_client.delete("/v1/items/1", headers={"origin": LOCAL}).status_code == 204
