"""What can be searched by, and what an answer tells: each against the sum of vectors that it stands for."""

import base64
import json
from typing import Any, ClassVar

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy import ndarray

from serving.app import create_app
from serving.engine.errors import OverloadedError
from serving.engine.queries import QueryPart, SearchQuery
from serving.engine.query_engine import QueryEngine
from serving.schemas.search import BatchAnswer, SearchAnswer
from serving.settings import ServingLimits, ServingSettings
from tests.unit.serving.small_index import LOCAL, SmallIndex

SCORE_TOLERANCE = 1e-6  # a vector scaled to unit length again moves its last bit
NUMBERS = {"content-type": "application/octet-stream"}


def found(answer: httpx2.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["hits"]]


def search(client: TestClient, **query: Any) -> list[int]:
    return found(client.post("/v1/search", json=query))


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def ranking(engine: QueryEngine, vector: ndarray, *, without: tuple[int, ...] = ()) -> list[int]:
    """By a full sort in float64, ties by id."""
    ids = engine.index.ids()
    scores = engine.index.vectors_of(ids).astype(np.float64) @ vector
    return [int(id) for id in ids[np.lexsort((ids, -scores))] if id not in without]


def stored(engine: QueryEngine, id: int) -> ndarray:
    return engine.index.vectors_of(np.array([id]))[0].astype(np.float64)


def written(vector: ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


class TestVectors:
    def test_are_the_same_as_numbers_in_base64_and_as_bytes(self, client: TestClient, engine: QueryEngine) -> None:
        vector = np.random.default_rng(5).normal(size=engine.index.dim).astype(np.float32)
        expected = search(client, vector=vector.tolist(), k=7)
        assert expected == ranking(engine, vector)[:7]
        assert search(client, vector=written(vector), k=7) == expected
        address = "/v1/search?k=7&exact=true"
        assert found(client.post(address, content=vector.astype("<f4").tobytes(), headers=NUMBERS)) == expected

    def test_as_bytes_have_all_else_in_the_address(self, client: TestClient, engine: QueryEngine) -> None:
        body = stored(engine, 4).astype("<f4").tobytes()
        condition = {"column": "class_name", "in": ["disc", "ring"]}
        params = {"k": "5", "filter": json.dumps(condition), "rerank": "diffusion", "include": ""}
        answer = client.post("/v1/search", params=params, content=body, headers=NUMBERS)
        by_json = client.post(
            "/v1/search",
            json={"vector": written(stored(engine, 4)), "k": 5, "filter": condition, "rerank": "diffusion"},
        )
        assert found(answer) == found(by_json)
        assert answer.json()["hits"][0].keys() == {"id", "score"}

    @pytest.mark.parametrize(
        ("address", "content", "refusal"),
        [
            ("/v1/search", b"", (422, "request.invalid")),
            ("/v1/search", b"12345", (422, "request.invalid")),
            ("/v1/search", b"1234" * 20_000, (422, "request.invalid")),
            ("/v1/search", b"1234", (422, "vector.wrong_dim")),
            ("/v1/search?top=3", b"1234" * 512, (422, "request.invalid")),
            ("/v1/search?k=0", b"1234" * 512, (422, "request.invalid")),
            ("/v1/search?filter=x", b"1234" * 512, (422, "request.invalid")),
            ("/v1/search?include=all", b"1234" * 512, (422, "request.invalid")),
            ("/v1/search", b"\xff" * 2048, (422, "vector.not_finite")),
            ("/v1/search", bytes(2048), (422, "vector.no_direction")),
        ],
    )
    def test_that_are_none_are_refused(
        self, client: TestClient, address: str, content: bytes, refusal: tuple[int, str]
    ) -> None:
        assert code(client.post(address, content=content, headers=NUMBERS)) == refusal

    @pytest.mark.parametrize("text", ["", "AAA=", "no base64", "A" * 200_000])
    def test_in_base64_that_are_none_are_refused(self, client: TestClient, text: str) -> None:
        assert code(client.post("/v1/search", json={"vector": text})) == (422, "request.invalid")

    def test_beside_a_body_that_has_fields_the_address_has_none(self, client: TestClient) -> None:
        assert code(client.post("/v1/search?k=3", json={"id": 1})) == (422, "request.invalid")


class TestParts:
    def test_are_summed_up_by_weight(self, client: TestClient, engine: QueryEngine, small_index: SmallIndex) -> None:
        """A picture of the gallery has its own vector, which ties what was sent to what is stored."""
        picture = (small_index.pictures / "ring" / "teal.png").read_bytes()
        [own] = search(client, image=base64.b64encode(picture).decode(), k=1)
        other = np.random.default_rng(6).normal(size=engine.index.dim)
        unit = other / np.linalg.norm(other)
        for of_picture, of_id, of_vector in ((1, 1, 1), (0.5, -0.25, 2), (1000, 0.001, -0.001), (-1, -1, -1)):
            total = of_picture * stored(engine, own) + of_id * stored(engine, 7) + of_vector * unit
            expected = ranking(engine, total, without=(7,))
            parts = [
                {"image": base64.b64encode(picture).decode(), "weight": of_picture},
                {"id": 7, "weight": of_id},
                {"vector": (3 * other).tolist(), "weight": of_vector},
            ]
            answer = client.post("/v1/search", json={"parts": parts, "k": 30})
            assert found(answer) == expected
            best = stored(engine, expected[0]) @ (total / np.linalg.norm(total))
            assert answer.json()["hits"][0]["score"] == pytest.approx(best, abs=SCORE_TOLERANCE)
            with_itself = search(client, parts=parts, k=30, include_self=True)
            assert with_itself == ranking(engine, total)

    def test_one_alone_is_as_if_there_were_no_parts(self, client: TestClient) -> None:
        assert search(client, parts=[{"id": 9}]) == search(client, id=9)
        assert search(client, parts=[{"id": 9, "weight": 3}]) == search(client, id=9)

    def test_may_be_several_files_of_a_form_with_regions(self, client: TestClient, small_index: SmallIndex) -> None:
        front = (small_index.pictures / "ring" / "teal.png").read_bytes()
        back = (small_index.pictures / "disc" / "gold.jpg").read_bytes()
        in_json = [
            {"image": base64.b64encode(front).decode(), "roi": [8, 8, 60, 70]},
            {"image": base64.b64encode(back).decode(), "weight": 0.5},
            {"image": base64.b64encode(front).decode(), "roi": [0, 0, 40, 40], "weight": -0.25},
            {"id": 3},
        ]
        names = ("front", "back", "front", None)
        in_form = [{**part, "image": name} if name else part for part, name in zip(in_json, names, strict=True)]
        files = {"front": ("a.png", front), "back": ("b.jpg", back)}
        data = {"parts": json.dumps(in_form), "k": 9, "include_self": "true"}
        by_form = client.post("/v1/search", files=files, data=data)
        assert found(by_form) == search(client, parts=in_json, k=9, include_self=True)

    @pytest.mark.parametrize(
        ("parts", "refusal"),
        [
            ([], (422, "request.invalid")),
            ([{}], (422, "request.invalid")),
            ([{"id": 1, "vector": [1.0]}], (422, "request.invalid")),
            ([{"id": 1, "roi": [0, 0, 1, 1]}], (422, "request.invalid")),
            ([{"id": 1, "weight": 0}], (422, "request.invalid")),
            ([{"id": 1, "weight": 1e9}], (422, "request.invalid")),
            ([{"id": 1, "weight": "1"}], (422, "request.invalid")),
            ([{"id": 1, "k": 3}], (422, "request.invalid")),
            ([{"id": 1}] * 17, (422, "request.invalid")),
            ([{"id": 1}, {"id": 99}], (404, "item.unknown")),
            ([{"id": 1}, {"id": 1, "weight": -1}], (422, "vector.cancelled_out")),
            ([{"id": 1}, {"url": "http://example.com/cat.jpg"}], (422, "url.off")),
        ],
    )
    def test_that_cannot_be_meant_are_refused(
        self, client: TestClient, parts: list[dict[str, Any]], refusal: tuple[int, str]
    ) -> None:
        assert code(client.post("/v1/search", json={"parts": parts})) == refusal

    @pytest.mark.parametrize(
        ("parts", "files"),
        [
            ('[{"image": "a"}]', ["b"]),
            ('[{"image": "a"}]', ["a", "b"]),
            ('[{"id": 1}]', ["image"]),
            ("[1", ["a"]),
            ('{"image": "a"}', ["a"]),
            ('[{"image": "k"}]', ["k"]),
            (None, ["image", "b"]),
            (None, ["b"]),
        ],
    )
    def test_of_a_form_name_its_files(self, client: TestClient, parts: str | None, files: list[str]) -> None:
        data = {} if parts is None else {"parts": parts}
        answer = client.post("/v1/search", files={name: (name, b"x") for name in files}, data=data)
        assert code(answer) == (422, "request.invalid")


class TestInclude:
    def test_tells_what_was_asked_for(self, client: TestClient, engine: QueryEngine) -> None:
        def answer(**how: Any) -> dict[str, Any]:
            return client.post("/v1/search", json={"id": 4, "k": 3, **how}).json()

        default = answer()
        assert "timings_ms" in default
        assert default["hits"][0].keys() == {
            "id", "score", "key", "class_name", "width", "height", "metadata", "image_url"
        }  # fmt: skip
        bare = answer(include=[])
        assert "timings_ms" not in bare
        assert bare["hits"] == [{"id": hit["id"], "score": hit["score"]} for hit in default["hits"]]
        for hit in answer(include=["vector"])["hits"]:
            assert hit.keys() == {"id", "score", "vector"}
            vector = np.frombuffer(base64.b64decode(hit["vector"]), "<f4")
            np.testing.assert_array_equal(vector, engine.index.vectors_of(np.array([hit["id"]]))[0])
        assert answer(include=["timings", "metadata", "vector"])["hits"][0].keys() == {*default["hits"][0], "vector"}

    def test_answers_are_what_the_openapi_document_says(self, client: TestClient) -> None:
        """They are not checked when they are written."""
        for include in ([], ["metadata"], ["vector", "timings"], ["metadata", "vector", "timings"]):
            tree = client.post("/v1/search", json={"id": 4, "include": include}).json()
            assert SearchAnswer.model_validate(tree, strict=True).model_dump(exclude_unset=True) == tree


class TestBatch:
    SEARCHES: ClassVar[list[dict[str, Any]]] = [
        {"id": 4, "k": 3},
        {"id": 99},
        {"vector": [1.0]},
        {"id": 1, "k": "5"},
        {"id": 1, "filter": {"column": "mood", "equals": 1}},
        {"id": 1, "filter": {}},
        {"parts": [{"id": 4}, {"id": 5, "weight": -1}], "k": 2, "include": []},
        {"id": 1, "rerank": {"name": "diffusion", "shortlist": 999}},
        {"id": 4, "k": 3, "rerank": "k_reciprocal"},
    ]

    def test_each_search_has_its_own_result(self, client: TestClient) -> None:
        answer = client.post("/v1/search:batch", json={"searches": self.SEARCHES})
        assert answer.status_code == 200
        tree = answer.json()
        assert BatchAnswer.model_validate(tree, strict=True).model_dump(exclude_unset=True) == tree
        for query, result in zip(self.SEARCHES, tree["results"], strict=True):
            alone = client.post("/v1/search", json=query)
            if alone.status_code == 200:
                assert result["answer"]["hits"] == alone.json()["hits"]
                assert ("timings_ms" in result["answer"]) == ("timings_ms" in alone.json())
            else:
                problem = {**alone.json(), "request_id": tree["request_id"]}
                assert result == {"problem": problem}
        codes = [result.get("problem", {}).get("code") for result in tree["results"]]
        assert codes[1:6] == ["item.unknown", "vector.wrong_dim", "request.invalid", "filter.invalid", "filter.invalid"]

    @pytest.mark.parametrize(
        ("content", "refusal"),
        [
            (b"", (400, "request.malformed")),
            (b"[]", (422, "request.invalid")),
            (b'{"searches": []}', (422, "request.invalid")),
            (b'{"searches": [{"id": 1}], "k": 3}', (422, "request.invalid")),
            (b'{"searches": [%s]}' % b",".join([b'{"id": 1}'] * 65), (422, "request.invalid")),
            (b'{"searches": [%s]}' % b",".join([b"{}"] * 300_000), (422, "request.invalid")),
        ],
    )
    def test_that_is_none_is_refused_as_a_whole(
        self, client: TestClient, content: bytes, refusal: tuple[int, str]
    ) -> None:
        headers = {"content-type": "application/json"}
        assert code(client.post("/v1/search:batch", content=content, headers=headers)) == refusal

    def test_a_form_is_no_batch(self, client: TestClient) -> None:
        assert code(client.post("/v1/search:batch", files={"a": b"a"})) == (415, "body.unsupported_type")

    def test_a_server_has_its_own_limits(self, engine: QueryEngine, small_index: SmallIndex) -> None:
        settings = ServingSettings(index=small_index.index, limits=ServingLimits(max_queries=2, max_parts=2, max_k=5))
        client = TestClient(create_app(engine, settings), base_url=LOCAL)
        assert code(client.post("/v1/search:batch", json={"searches": [{"id": 1}] * 3})) == (422, "request.invalid")
        assert code(client.post("/v1/search", json={"parts": [{"id": 1}] * 3, "k": 1})) == (422, "request.invalid")
        results = client.post("/v1/search:batch", json={"searches": [{"id": 1, "k": 6}, {"id": 1, "k": 5}]}).json()
        assert [list(result) for result in results["results"]] == [["problem"], ["answer"]]

    def test_where_nothing_is_let_in_the_client_is_to_wait(
        self, client: TestClient, engine: QueryEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def refuse(query: SearchQuery) -> None:
            raise OverloadedError("full", retry_after_seconds=2.2)

        monkeypatch.setattr(engine, "search", refuse)
        for path, body in (("/v1/search", {"id": 1}), ("/v1/search:batch", {"searches": [{"id": 1}, {"id": 2}]})):
            answer = client.post(path, json=body)
            assert code(answer) == (429, "server.overloaded")
            assert answer.headers["retry-after"] == "3"
        mixed = client.post("/v1/search:batch", json={"searches": [{"id": 1}, {}]})
        assert [result["problem"]["code"] for result in mixed.json()["results"]] == [
            "server.overloaded",
            "request.invalid",
        ]


def test_the_engine_is_asked_what_the_api_was(engine: QueryEngine) -> None:
    """A part of the engine is exactly one thing, as one of the API is."""
    with pytest.raises(ValueError, match="exactly one"):
        QueryPart(id=1, vector=[1.0])
