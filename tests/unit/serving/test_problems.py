import base64
import io
import json
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.problems import PROBLEM_KINDS
from serving.safety.url_fetching import PictureFetcher
from serving.schemas.search import SearchRequest
from serving.settings import ServingLimits, ServingSettings, UrlFetching
from tests.unit.serving.small_index import LOCAL, SmallIndex, draw

JSON = {"content-type": "application/json"}
INVALID = "request.invalid"


def picture_bytes(*, side: int = 96) -> bytes:
    file = io.BytesIO()
    draw("disc", "teal", side=side).save(file, format="PNG")
    return file.getvalue()


def form(**fields: Any) -> dict[str, Any]:
    return {"files": {"image": ("a.png", fields.pop("image", picture_bytes()))}, "data": fields}


def region_json(roi: str) -> dict[str, Any]:
    """Written by hand, because the client's own encoder refuses NaN."""
    image = base64.b64encode(picture_bytes()).decode()
    return {"content": f'{{"image": "{image}", "roi": {roi}}}', "headers": JSON}


SEARCHES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no JSON": ({"content": b"{", "headers": JSON}, 400, "request.malformed"),
    "no body": ({"content": b"", "headers": JSON}, 400, "request.malformed"),
    "not UTF-8": ({"content": b'{"id": "\xff"}', "headers": JSON}, 400, "request.malformed"),
    "a list": ({"json": [1]}, 422, "request.invalid"),
    "no query": ({"json": {}}, 422, "request.invalid"),
    "two queries": ({"json": {"id": 1, "vector": [1.0]}}, 422, "request.invalid"),
    "an unknown field": ({"json": {"id": 1, "top": 3}}, 422, "request.invalid"),
    "k of 0": ({"json": {"id": 1, "k": 0}}, 422, "request.invalid"),
    "k above the limit": ({"json": {"id": 1, "k": 1001}}, 422, "request.invalid"),
    "k as text": ({"json": {"id": 1, "k": "5"}}, 422, "request.invalid"),
    "k as text in a form": (form(k="many"), 422, "request.invalid"),
    "k above the limit in a form": (form(k=1001), 422, "request.invalid"),
    "self without id": ({"json": {"vector": [1.0], "include_self": True}}, 422, "request.invalid"),
    "a negative id": ({"json": {"id": -1}}, 422, "request.invalid"),
    "an unknown version": ({"json": {"id": 1, "version": "v0009"}}, 404, "version.unknown"),
    "an unknown version in a form": (form(version="v0009"), 404, "version.unknown"),
    "no version's name": ({"json": {"id": 1, "version": "../v0001"}}, 422, "request.invalid"),
    "an unknown id": ({"json": {"id": 24}}, 404, "item.unknown"),
    "the largest id": ({"json": {"id": 2**63 - 1}}, 404, "item.unknown"),
    "an id too large": ({"json": {"id": 2**63}}, 422, "request.invalid"),
    "an empty vector": ({"json": {"vector": []}}, 422, "request.invalid"),
    "a short vector": ({"json": {"vector": [0.6, 0.8]}}, 422, "vector.wrong_dim"),
    "NaN": ({"content": json.dumps({"vector": [float("nan")] * 512}), "headers": JSON}, 422, "vector.not_finite"),
    "infinity": ({"content": b'{"vector": [%s1e999]}' % (b"0," * 511), "headers": JSON}, 422, "vector.not_finite"),
    "zeros": ({"json": {"vector": [0] * 512}}, 422, "vector.no_direction"),
    "no base64": ({"json": {"image": "data:image/png;base64,AAAA"}}, 422, "request.invalid"),
    "an empty picture": (form(image=b""), 422, "image.empty"),
    "a text": (form(image=b"not a picture at all"), 415, "image.not_an_image"),
    "an SVG": (form(image=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415, "image.not_an_image"),
    "a broken picture": (form(image=picture_bytes()[:-60]), 422, "image.truncated"),
    "a form without picture": ({"files": {"k": (None, "3")}}, 422, "request.invalid"),
    "a picture as text": ({"files": {"image": (None, "abc")}}, 422, "request.invalid"),
    "two pictures": ({"files": [("image", ("a", b"a")), ("image", ("b", b"b"))]}, 422, "request.invalid"),
    "k twice": ({"files": [("k", (None, "1")), ("k", (None, "2"))]}, 422, "request.invalid"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "request.malformed"),
    "no form": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400,
        "request.malformed",
    ),
    "a region of three numbers": (region_json("[1, 2, 3]"), 422, "request.invalid"),
    "a region of five numbers": (region_json("[1, 2, 3, 4, 5]"), 422, "request.invalid"),
    "a region as text": (region_json('"1,2,3,4"'), 422, "request.invalid"),
    "a region with NaN": (region_json("[NaN, 2, 3, 4]"), 422, "request.invalid"),
    "a region with infinity": (region_json("[0, 0, Infinity, 4]"), 422, "request.invalid"),
    "a region beyond floats": (region_json("[0, 0, 1e999, 4]"), 422, "request.invalid"),
    "a region of long integers": (region_json(f"[0, 0, {10**400}, 4]"), 422, "request.invalid"),
    "a region without picture": ({"json": {"id": 1, "roi": [0, 0, 9, 9]}}, 422, "request.invalid"),
    "an empty region": (region_json("[5, 0, 5, 9]"), 422, "roi.empty"),
    "a region turned round": (region_json("[9, 0, 5, 9]"), 422, "roi.empty"),
    "a region within a pixel": (region_json("[0, 4.6, 9, 5.4]"), 422, "roi.empty"),
    "a region beside the picture": (region_json("[96, 0, 120, 9]"), 422, "roi.outside"),
    "a region above the picture": (region_json("[0, -9, 9, 0]"), 422, "roi.outside"),
    "a region far away": (region_json("[1e308, 1e308, 1.5e308, 1.5e308]"), 422, "roi.outside"),
    "three numbers in a form": (form(roi="1,2,3"), 422, "request.invalid"),
    "commas in a form": (form(roi="," * 100_000), 422, "request.invalid"),
    "words in a form": (form(roi="left,top,right,bottom"), 422, "request.invalid"),
    "NaN in a form": (form(roi="0,0,nan,9"), 422, "request.invalid"),
    "infinity in a form": (form(roi="0,0,inf,9"), 422, "request.invalid"),
    "an empty region in a form": (form(roi="5,0,5,9"), 422, "roi.empty"),
    "a region outside in a form": (form(roi="0,96.5,9,120"), 422, "roi.outside"),
    "a region of a broken picture": (form(image=picture_bytes()[:-60], roi="0,0,9,9"), 422, "image.truncated"),
    "recall of 0": ({"json": {"id": 1, "recall": 0}}, 422, "request.invalid"),
    "recall above 1": ({"json": {"id": 1, "recall": 1.01}}, 422, "request.invalid"),
    "recall of an exact search": ({"json": {"id": 1, "recall": 0.9, "exact": True}}, 422, "request.invalid"),
    "a filter as text": ({"json": {"id": 1, "filter": "class_name"}}, 422, "request.invalid"),
    "an empty filter": ({"json": {"id": 1, "filter": {}}}, 422, "filter.invalid"),
    "a filter of no form": ({"json": {"id": 1, "filter": {"class_name": "disc"}}}, 422, "filter.invalid"),
    "a filter of an unknown column": (
        {"json": {"id": 1, "filter": {"column": "mood", "equals": 1}}},
        422,
        "filter.invalid",
    ),
    "a filter of another type": (
        {"json": {"id": 1, "filter": {"column": "width", "equals": "wide"}}},
        422,
        "filter.invalid",
    ),
    "an endless filter": (
        {"content": b'{"id": 1, "filter": %s1%s}' % (b'{"not": ' * 60, b"}" * 60), "headers": JSON},
        422,
        "filter.invalid",
    ),
    "a filter too deep to read": (
        {"content": b'{"id": 1, "filter": %s1%s}' % (b'{"not": ' * 9999, b"}" * 9999), "headers": JSON},
        400,
        "request.malformed",
    ),
    "a filter that is no JSON in a form": (form(filter="class_name = disc"), 422, "request.invalid"),
    "a filter too deep in a form": (form(filter='{"not": ' * 99_999), 422, "request.invalid"),
    "a list as filter in a form": (form(filter="[1]"), 422, "request.invalid"),
    "an unknown method": ({"json": {"id": 1, "rerank": "magic"}}, 422, "request.invalid"),
    "a method without name": ({"json": {"id": 1, "rerank": {"shortlist": 5}}}, 422, "request.invalid"),
    "an unknown setting of a method": (
        {"json": {"id": 1, "rerank": {"name": "diffusion", "beta": 1}}},
        422,
        "request.invalid",
    ),
    "a long shortlist": ({"json": {"id": 1, "rerank": {"name": "diffusion", "shortlist": 201}}}, 422, INVALID),
    "many neighbours": (
        {"json": {"id": 1, "rerank": {"name": "alpha_query_expansion", "num_neighbours": 201}}},
        422,
        "request.invalid",
    ),
    "an unknown method in a form": (form(rerank="magic"), 422, "request.invalid"),
    "a broken method in a form": (form(rerank='{"name": '), 422, "request.invalid"),
    "another type": ({"content": b"x", "headers": {"content-type": "image/png"}}, 415, "body.unsupported_type"),
    "no type": ({"content": b"x"}, 415, "body.unsupported_type"),
}
OTHERS: dict[str, tuple[str, str, int, str]] = {
    "unknown route": ("GET", "/v2/search", 404, "route.unknown"),
    "unknown page file": ("GET", "/page/other.js", 404, "route.unknown"),
    "outside the page": ("GET", "/page/..%2f..%2fapp.py", 404, "route.unknown"),
    "wrong method": ("GET", "/v1/search", 405, "method.not_allowed"),
    "unknown item": ("GET", "/v1/items/24", 404, "item.unknown"),
    "unknown item's picture": ("GET", "/v1/items/24/image", 404, "item.unknown"),
    "an item that is no number": ("GET", "/v1/items/first", 422, "request.invalid"),
    "an item too large": ("GET", f"/v1/items/{10**30}", 422, "request.invalid"),
    "no items": ("GET", "/v1/items?sample=0", 422, "request.invalid"),
    "too many items": ("GET", "/v1/items?sample=201", 422, "request.invalid"),
    "a seed that is no number": ("GET", "/v1/items?seed=x", 422, "request.invalid"),
}


def check_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem.keys() - {"errors"} == {"title", "status", "detail", "code", "fix", "request_id"}
    assert all(problem.values())
    assert problem["status"] == status == PROBLEM_KINDS[code].status
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert ("errors" in problem) == (code == "request.invalid")
    return dict(problem)


@pytest.mark.parametrize("case", SEARCHES)
def test_a_bad_search_is_a_problem(client: TestClient, case: str) -> None:
    request, status, code = SEARCHES[case]
    check_problem(client.post("/v1/search", **request), status, code)


@pytest.mark.parametrize(
    ("rerank", "field", "message"),
    [
        ("magic", "rerank.name", "must be one of average_query_expansion, .*, diffusion"),
        ({"shortlist": 5}, "rerank.name", "must be one of average_query_expansion, .*, diffusion"),
        ({"name": "x" * 5_000}, "rerank.name", "must be one of average_query_expansion, .*, diffusion"),
        (
            {"name": "alpha_query_expansion", "alhpa": 3},
            "rerank.alhpa",
            "there is no such setting; alpha_query_expansion has num_neighbours, alpha",
        ),
        ({"name": "diffusion", "alpha": 2}, "rerank.alpha", "less than 1"),
        ({"name": "diffusion", "alpha": "0.5"}, "rerank.alpha", "valid number"),
        (3, "rerank", "a method's name, or an object"),
    ],
)
def test_a_wrong_method_is_told_what_there_is(client: TestClient, rerank: Any, field: str, message: str) -> None:
    search = {"id": 1, "rerank": rerank}
    alone = client.post("/v1/search", json=search)
    [in_batch] = client.post("/v1/search:batch", json={"searches": [search]}).json()["results"]
    for problem in (check_problem(alone, 422, "request.invalid"), in_batch["problem"]):
        [error] = problem["errors"]
        assert error["field"] == field
        assert re.search(message, error["message"])
        assert len(problem["detail"]) < 500


def test_every_problem_of_a_search_is_in_the_openapi_document(client: TestClient) -> None:
    responses = client.get("/openapi.json").json()["paths"]["/v1/search"]["post"]["responses"]
    documented = {
        (int(status), code)
        for status, answer in responses.items()
        for code in answer["content"].get("application/problem+json", {}).get("examples", {})
    }
    assert {(status, code) for _, status, code in SEARCHES.values()} <= documented


def test_a_region_outside_is_told_the_size_of_the_upright_picture(client: TestClient) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    draw("disc", "teal").crop((0, 0, 60, 40)).save(file, format="JPEG", exif=exif)
    answer = client.post("/v1/search", files={"image": file.getvalue()}, data={"roi": "40,0,60,40"})
    assert "40 x 60" in check_problem(answer, 422, "roi.outside")["detail"]


@pytest.mark.parametrize("case", OTHERS)
def test_a_bad_request_is_a_problem(client: TestClient, case: str) -> None:
    method, path, status, code = OTHERS[case]
    check_problem(client.request(method, path), status, code)


def test_codes_and_statuses_never_change() -> None:
    # Clients branch on them. New codes are added here; a line is never edited.
    assert {code: kind.status for code, kind in PROBLEM_KINDS.items()} == {
        "request.malformed": 400,
        "request.invalid": 422,
        "request.refused": 400,
        "host.not_allowed": 421,
        "origin.not_allowed": 403,
        "key.missing": 401,
        "key.unknown": 401,
        "key.lacks_scope": 403,
        "writes.off": 403,
        "rate.exceeded": 429,
        "server.busy": 503,
        "route.unknown": 404,
        "method.not_allowed": 405,
        "body.too_large": 413,
        "body.too_slow": 408,
        "url.off": 422,
        "url.not_allowed": 422,
        "url.unreachable": 422,
        "url.too_large": 413,
        "url.too_slow": 422,
        "body.unsupported_type": 415,
        "image.empty": 422,
        "image.not_an_image": 415,
        "image.format_not_allowed": 415,
        "image.truncated": 422,
        "image.too_many_pixels": 413,
        "image.absurd_size": 422,
        "image.undecodable": 422,
        "filter.invalid": 422,
        "encoder.unavailable": 422,
        "roi.empty": 422,
        "roi.outside": 422,
        "item.unknown": 404,
        "pictures.unavailable": 404,
        "vector.wrong_dim": 422,
        "vector.not_finite": 422,
        "vector.no_direction": 422,
        "vector.cancelled_out": 422,
        "item.exists": 409,
        "item.unfit": 422,
        "version.unknown": 404,
        "version.refused": 409,
        "version.off": 422,
        "index.busy": 503,
        "index.compaction_failed": 500,
        "server.overloaded": 429,
        "server.not_ready": 503,
        "server.error": 500,
    }


def test_every_refused_field_is_named(client: TestClient) -> None:
    problem = client.post("/v1/search", json={"id": -1, "k": 0, "top": 1}).json()
    assert {error["field"] for error in problem["errors"]} == {"id", "k", "top"}


def test_of_many_refused_fields_the_first_are_named_and_the_others_counted(client: TestClient) -> None:
    problem = check_problem(client.post("/v1/search", json=dict.fromkeys(map(str, range(1000)), 0)), 422, INVALID)
    assert len(problem["errors"]) == 20
    assert problem["detail"].endswith("; and 980 more")


def test_a_long_name_is_not_sent_back_whole(client: TestClient) -> None:
    name = "x" * 3_000
    for request in ({"json": {name: 0}}, {"files": [(name, (None, "1")), (name, (None, "2"))]}):
        answer = client.post("/v1/search", **request)
        check_problem(answer, 422, INVALID)
        assert name not in answer.text


def test_a_body_of_more_values_than_any_search_is_refused_unparsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[object] = []
    monkeypatch.setattr(SearchRequest, "model_validate_json", lambda *_, **__: parsed.append("a body"))
    for body in (b"{%s}" % b",".join(b'"a%d":0' % i for i in range(400_000)), b'{"a": [%s1]}' % (b"[]," * 100_000)):
        answer = client.post("/v1/search", content=body, headers=JSON)
        check_problem(answer, 422, INVALID)
        assert len(answer.content) < 2_000
    assert not parsed


def test_a_large_body_is_checked_beside_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    validate, threads = SearchRequest.model_validate_json, []

    def validate_recorded(*arguments: Any, **options: Any) -> SearchRequest:
        threads.append(threading.current_thread())
        return validate(*arguments, **options)

    monkeypatch.setattr(SearchRequest, "model_validate_json", validate_recorded)
    for size in (100, 100_000):
        assert client.post("/v1/search", content=b'{"id": 1}'.ljust(size), headers=JSON).status_code == 200
    on_the_loop, beside_it = threads
    assert on_the_loop is not beside_it


class TestHosts:
    @pytest.fixture
    def public_client(self, engine: QueryEngine, small_index: SmallIndex) -> TestClient:
        settings = ServingSettings(index=small_index.index, host="0.0.0.0", requires_keys=False)
        return TestClient(create_app(engine, settings), base_url="http://pictures.example")

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:80"])
    def test_a_local_server_answers_to_the_names_of_this_machine(self, client: TestClient, host: str) -> None:
        assert client.get("/v1/info", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "::1", "[::2]", ""],
    )
    def test_a_local_server_answers_to_no_other_name(self, client: TestClient, host: str) -> None:
        # A website whose name is made to point at this machine would otherwise read the pictures of its visitor.
        for path in ("/", "/v1/info", "/nothing/here"):
            check_problem(client.get(path, headers={"host": host}), 421, "host.not_allowed")

    def test_two_names_are_refused(self, client: TestClient) -> None:
        answer = client.get("/v1/info", headers=[("host", "localhost"), ("host", "evil.example")])
        check_problem(answer, 421, "host.not_allowed")

    @pytest.mark.parametrize(
        ("host", "name"), [("127.0.0.5", "127.0.0.5"), ("::1", "[::1]"), ("localhost", "localhost")]
    )
    def test_the_address_listened_on_is_always_a_name(
        self, engine: QueryEngine, small_index: SmallIndex, host: str, name: str
    ) -> None:
        client = TestClient(create_app(engine, ServingSettings(index=small_index.index, host=host)))
        assert client.get("/livez", headers={"host": f"{name}:8000"}).status_code == 200
        check_problem(client.get("/livez", headers={"host": "evil.example"}), 421, "host.not_allowed")

    def test_a_public_server_answers_to_every_name(self, public_client: TestClient) -> None:
        assert public_client.get("/livez").status_code == 200


def test_a_path_cannot_forge_lines_of_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="serving"):
        client.get("/a%0a12:00:00%20GET%20/admin%1b[2J")
    (line,) = [record.getMessage() for record in caplog.records if "admin" in record.getMessage()]
    assert line.isprintable()


def test_refusals_say_what_would_be_accepted(client: TestClient) -> None:
    for method, path, allowed in (
        ("GET", "/v1/search", "POST"),
        ("PATCH", "/v1/items", "GET, POST"),
        ("PATCH", "/v1/items/5", "GET, PUT, DELETE"),
        ("POST", "/livez", "GET"),
        ("POST", "/page/problems.js", "GET, HEAD"),
    ):
        refused = client.request(method, path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed), path
    refused = client.post("/v1/search", content=b"x", headers={"content-type": "text/plain"})
    assert refused.headers["accept-post"] == "multipart/form-data, application/json, application/octet-stream"
    named = "the body is text/plain; send multipart/form-data or application/json or application/octet-stream"
    assert refused.json()["detail"] == named


def test_bytes_that_are_no_vector_are_refused_without_a_warning(client: TestClient) -> None:
    numbers = {"content-type": "application/octet-stream"}
    for value in (b"\x01\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"):  # NaNs, the first a signalling one
        with warnings.catch_warnings(action="error"):
            answer = client.post("/v1/search", content=value * 512, headers=numbers)
        check_problem(answer, 422, "vector.not_finite")


class TestBodyLimit:
    def test_fetched_pictures_count_as_long_as_their_request_runs(
        self, engine: QueryEngine, small_index: SmallIndex
    ) -> None:
        async def fetched(url: str, settings: UrlFetching) -> bytes:
            return picture

        picture = picture_bytes(side=1024)
        limits = ServingLimits(max_bytes_at_once=3 * len(picture) + 1024)
        app = create_app(engine, ServingSettings(index=small_index.index, limits=limits))
        app.state.fetcher = PictureFetcher(UrlFetching(hosts=("img.example",)), fetch=fetched)
        client = TestClient(app, base_url=LOCAL)
        one = {"url": "http://img.example/"}
        for _ in range(5):  # none is still counted when its request is over
            assert client.post("/v1/search", json={"parts": 3 * [one]}).status_code == 200
        check_problem(client.post("/v1/search", json={"parts": 4 * [one]}), 503, "server.busy")

    @pytest.fixture
    def narrow_client(self, engine: QueryEngine, small_index: SmallIndex) -> TestClient:
        settings = ServingSettings(index=small_index.index, limits=ServingLimits(max_body_bytes=2048, max_k=5))
        return TestClient(create_app(engine, settings), base_url=LOCAL)

    def test_an_announced_length_is_refused_unread(self, narrow_client: TestClient) -> None:
        answer = narrow_client.post("/v1/search", files={"image": picture_bytes(side=1024)})
        check_problem(answer, 413, "body.too_large")
        assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b"])
    def test_an_endless_body_is_cut_off(self, narrow_client: TestClient, content_type: str) -> None:
        num_read = 0

        def endless() -> Iterator[bytes]:
            nonlocal num_read
            yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            while num_read < 1000:
                num_read += 1
                yield b"x" * 512

        answer = narrow_client.post("/v1/search", content=endless(), headers={"content-type": content_type})
        check_problem(answer, 413, "body.too_large")

    def test_a_body_at_the_limit_is_read(self, narrow_client: TestClient) -> None:
        body = b'{"id": 1, "k": 5}'.ljust(2048)
        assert narrow_client.post("/v1/search", content=body, headers=JSON).status_code == 200
        answer = narrow_client.post("/v1/search", content=body + b" ", headers=JSON)
        check_problem(answer, 413, "body.too_large")

    def test_k_has_the_servers_own_limit(self, narrow_client: TestClient) -> None:
        problem = check_problem(narrow_client.post("/v1/search", json={"id": 1, "k": 6}), 422, "request.invalid")
        assert problem["errors"][0]["field"] == "k"


def test_an_unexpected_error_tells_the_log_everything_and_the_client_nothing(
    client: TestClient, engine: QueryEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret of /srv/index")

    monkeypatch.setattr(engine.index, "search", fail)
    with caplog.at_level(logging.ERROR):
        answer = client.post("/v1/search", json={"id": 1})
    problem = check_problem(answer, 500, "server.error")
    assert "secret" not in answer.text
    assert problem["request_id"] in caplog.text
    assert "secret of /srv/index" in caplog.text
