import asyncio
import base64
import inspect
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import numpy as np
import pytest
import tenacity
import uvicorn
from PIL import Image

from data_pipelines.decode import decode_image
from lookalike.api_client import ApiClient, ApiClientSettings, ApiProblem, AsyncApiClient
from lookalike.errors import ResourceError
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.settings import ServingSettings
from tests.unit.serving.small_index import SmallIndex, make_small_index

URL = "http://pictures.example"
Handler = Callable[[httpx2.Request], httpx2.Response]
# Takes either client; the asynchronous one gives something to await.
Question = Callable[[Any], Any]
both = pytest.mark.parametrize("kind", [ApiClient, AsyncApiClient])

ITEM = {
    "id": 7,
    "key": "disc/gold",
    "class_name": None,
    "width": 96,
    "height": 64,
    "metadata": {"price": 1.5},
    "image_url": None,
}
SEARCH_ANSWER = {
    "request_id": "r1",
    "index_version": "v0001",
    "encoder_fingerprint": "3f9c",
    "timings_ms": {"total": 1.5},
    "hits": [{**ITEM, "score": 0.5}],
}
PROBLEM = {
    "title": "Service Unavailable",
    "status": 503,
    "detail": "the server is starting",
    "code": "server.not_ready",
    "fix": "Try again shortly.",
    "request_id": "r2",
}


def ask(kind: type, question: Question, handler: Handler | None = None, *, url: str = URL, **settings: Any) -> Any:
    options: dict[str, Any] = {"settings": ApiClientSettings(**settings)}
    if handler is not None:
        options["transport"] = httpx2.MockTransport(handler)
    if kind is ApiClient:
        with ApiClient(url, **options) as client:
            return question(client)

    async def ask_async() -> Any:
        async with AsyncApiClient(url, **options) as client:
            return await question(client)

    return asyncio.run(ask_async())


class Script:
    """Answers requests with these, one after the other, and keeps the requests."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers, self.requests = list(answers), list[httpx2.Request]()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers[len(self.requests) - 1]
        if isinstance(answer, Exception):
            raise answer
        # Each client makes the response its own, and cases share theirs.
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)


def problem(status: int = 503, *, retry_after: str | None = None, **changes: Any) -> httpx2.Response:
    headers = {"content-type": "application/problem+json"} | ({"retry-after": retry_after} if retry_after else {})
    return httpx2.Response(status, content=json.dumps({**PROBLEM, "status": status, **changes}), headers=headers)


def item() -> httpx2.Response:
    return httpx2.Response(200, json=ITEM)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Fills with the pauses between attempts, none of which is made."""
    recorded: list[float] = []

    async def pause(seconds: float) -> None:
        recorded.append(seconds)

    monkeypatch.setattr(tenacity.nap.time, "sleep", recorded.append)
    monkeypatch.setattr(asyncio, "sleep", pause)
    return recorded


@pytest.fixture(scope="module")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return make_small_index(tmp_path_factory.mktemp("small_index"))


@pytest.fixture
def server_url(small_index: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real server on a real socket."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app = create_app(QueryEngine.open(small_index.index), ServingSettings(index=small_index.index))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)
    assert not thread.is_alive()


@both
def test_a_real_server_is_understood_in_every_method(kind: type, server_url: str, small_index: SmallIndex) -> None:
    def told(path: str) -> Any:
        return httpx2.get(server_url + path, trust_env=False).json()

    def asked(question: Question) -> Any:
        return ask(kind, question, url=server_url)

    assert asked(lambda client: client.is_ready()) is True
    info = asked(lambda client: client.info())
    raw = told("/v1/info")
    assert (info.num_vectors, info.versions, info.scopes) == (24, raw["versions"], ("read",))
    assert asdict(info.limits) == raw["limits"] | {"formats": tuple(raw["limits"]["formats"])}
    assert (info.rate_limit, info.takes_urls) == (None, False)
    assert [point.recall for point in info.recall_curve] == [point["recall"] for point in raw["recall_curve"]]
    assert asdict(info.default_effort) == raw["default_effort"]
    assert info.metadata_columns == ("key", "class_name", "label", "split", "width", "height")

    items = asked(lambda client: client.random_items(5, seed=3))
    assert [item.key for item in items] == [item["key"] for item in told("/v1/items?sample=5&seed=3")["items"]]
    first = items[0]
    assert asked(lambda client: client.item(first.id)) == first
    (file,) = small_index.pictures.glob(f"{first.key}.*")
    assert asked(lambda client: client.item_image(first.id)) == file.read_bytes()

    found = asked(lambda client: client.search(file.read_bytes(), k=3))
    assert found.hits[0].id == first.id
    assert len(found.hits) == 3
    assert (found.index_version, found.encoder_fingerprint) == (info.index_version, info.encoder_fingerprint)
    by_id = asked(lambda client: client.search(id=first.id, k=3, include_self=True))
    assert [hit.id for hit in by_id.hits] == [hit.id for hit in found.hits]
    assert first.id not in [hit.id for hit in asked(lambda client: client.search(id=first.id)).hits]

    condition = {"column": "class_name", "equals": first.class_name}
    for method in ("diffusion", {"name": "k_reciprocal", "num_neighbours": 3}):
        answers = [
            asked(lambda client, query=query, method=method: client.search(**query, filter=condition, rerank=method))
            for query in ({"image": file.read_bytes()}, {"id": first.id, "include_self": True})
        ]
        assert [hit.id for hit in answers[0].hits] == [hit.id for hit in answers[1].hits]
        assert {hit.class_name for hit in answers[0].hits} == {first.class_name}
        assert "rerank" in answers[0].timings_ms
    assert asked(lambda client: client.search(file.read_bytes(), k=3, recall=0.9)).hits == found.hits


@both
def test_a_region_is_searched_as_its_own_picture(kind: type, server_url: str, small_index: SmallIndex) -> None:
    photo = (small_index.pictures / "disc" / "gold.jpg").read_bytes()
    cut = io.BytesIO()
    decode_image(photo).crop((10, 20, 70, 61)).save(cut, format="PNG")
    expected = ask(kind, lambda client: client.search(cut.getvalue(), k=4), url=server_url)
    for roi in ((10, 20, 70, 61), np.array([10.25, 19.75, 70.5, 60.75])):
        found = ask(kind, lambda client, roi=roi: client.search(photo, roi=roi, k=4, exact=True), url=server_url)
        assert found.hits == expected.hits


@both
def test_a_vector_arrives_to_the_last_bit(kind: type) -> None:
    vector = np.random.default_rng(0).normal(size=64).astype(np.float32)
    script = Script(httpx2.Response(200, json=SEARCH_ANSWER))
    ask(kind, lambda client: client.search(vector=vector, k=5, exact=True, rerank="diffusion"), script)
    sent = json.loads(script.requests[0].content)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(sent.pop("vector")), "<f4"), vector)
    assert sent == {"k": 5, "exact": True, "rerank": "diffusion"}
    script.requests.clear()
    ask(kind, lambda client: client.search(vector=vector.astype(np.float64) / 3), script)
    np.testing.assert_array_equal(json.loads(script.requests[0].content)["vector"], vector.astype(np.float64) / 3)


@both
def test_fields_of_a_newer_server_are_ignored(kind: type) -> None:
    hit = {**SEARCH_ANSWER["hits"][0], "mood": "sunny"}
    answers = Script(
        httpx2.Response(200, json={**SEARCH_ANSWER, "hits": [hit], "advice": {"tea": True}}),
        problem(418, code="server.teapot", advice={"tea": True}),
    )
    answer = ask(kind, lambda client: client.search(id=1), answers)
    assert (answer.hits[0].key, answer.hits[0].score, answer.hits[0].class_name) == ("disc/gold", 0.5, None)
    answers.answers.pop(0)
    answers.requests.clear()
    with pytest.raises(ApiProblem) as raised:
        ask(kind, lambda client: client.search(id=1), answers)
    assert (raised.value.status, raised.value.code) == (418, "server.teapot")


@both
def test_a_refusal_carries_all_that_the_server_says(kind: type, server_url: str) -> None:
    with pytest.raises(ApiProblem, match=r"item\.unknown.*request [0-9a-f]{32}") as raised:
        ask(kind, lambda client: client.search(id=99), url=server_url)
    refusal = raised.value
    assert (refusal.status, refusal.code) == (404, "item.unknown")
    assert "99" in refusal.detail
    assert "GET /v1/items" in refusal.fix
    assert refusal.request_id in str(refusal)
    with pytest.raises(ApiProblem) as raised:
        ask(kind, lambda client: client.search(picture_bytes(), roi=(8, 8, 8, 9)), url=server_url)
    assert raised.value.code == "roi.empty"


@both
def test_where_nobody_listens_the_address_is_named(
    kind: type, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ResourceError, match=f"no server answers at {url}"):
        ask(kind, lambda client: client.info(), url=url, num_attempts=3)
    assert len(pauses) == 2
    assert ask(kind, lambda client: client.is_ready(), url=url) is False
    assert len(pauses) == 2  # Readiness is asked once.


@both
def test_a_server_that_is_not_ready_says_so_at_once(kind: type, pauses: list[float]) -> None:
    script = Script(problem(503, retry_after="1"))
    assert ask(kind, lambda client: client.is_ready(), script) is False
    assert not pauses


@both
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (httpx2.Response(200, html="<h1>Welcome to nginx"), "200 with text/html.*'<h1>Welcome to nginx'"),
        (httpx2.Response(502, text="Bad Gateway"), "502 with text/plain.*'Bad Gateway'"),
        (httpx2.Response(302, headers={"location": "/login"}), "302 with no content type"),
        (httpx2.Response(200, json=[1]), "JSON of another kind .as a whole"),
        (
            httpx2.Response(200, json={k: v for k, v in ITEM.items() if k != "key"}),
            r"another kind .key: Field required",
        ),
        (httpx2.Response(200, json={**ITEM, "width": "wide"}), r"another kind .width"),
        (httpx2.Response(500, json={"detail": "oops"}), r"500 with JSON of another kind .status"),
    ],
)
def test_an_answer_of_something_else_is_shown(kind: type, answer: httpx2.Response, found: str) -> None:
    with pytest.raises(ResourceError, match=rf"{URL}/v1/items/7 answered .*{found}"):
        ask(kind, lambda client: client.item(7), Script(answer))


@both
def test_a_page_is_not_taken_for_a_picture(kind: type) -> None:
    with pytest.raises(ResourceError, match="text/html"):
        ask(kind, lambda client: client.item_image(7), Script(httpx2.Response(200, html="<h1>Log in")))


class TestPatience:
    @both
    @pytest.mark.parametrize("status", [429, 503])
    def test_the_pause_is_the_one_that_the_server_wishes(self, kind: type, status: int, pauses: list[float]) -> None:
        script = Script(problem(status, retry_after="3"), problem(status, retry_after="0"), item())
        assert ask(kind, lambda client: client.item(7), script).key == "disc/gold"
        assert pauses == [3, 0]

    @both
    def test_what_is_still_being_opened_is_asked_for_again_and_no_answer_waited_for_without_end(
        self, kind: type, pauses: list[float]
    ) -> None:
        script = Script(problem(429, retry_after="1"), httpx2.Response(200, json=SEARCH_ANSWER))
        found = ask(kind, lambda client: client.search(id=1, version="v0001"), script, timeout_seconds=2.5)
        assert (found.index_version, pauses) == ("v0001", [1])
        assert [request.extensions["timeout"]["read"] for request in script.requests] == [2.5, 2.5]

    @both
    def test_a_wish_may_be_a_date(self, kind: type, pauses: list[float]) -> None:
        soon, past = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (30, -30))
        answers = [problem(retry_after=format_datetime(moment, usegmt=True)) for moment in (soon, past)]
        ask(kind, lambda client: client.item(7), Script(*answers, item()), longest_pause_seconds=60)
        # A date has whole seconds, and some time passes until it is read.
        assert 15 < pauses[0] <= 30
        assert pauses[1] == 0

    @both
    def test_a_server_that_wishes_a_longer_pause_is_not_asked_again(self, kind: type, pauses: list[float]) -> None:
        script = Script(problem(503, retry_after="11"))
        with pytest.raises(ApiProblem, match=r"server\.not_ready"):
            ask(kind, lambda client: client.item(7), script)
        assert not pauses

    @both
    def test_own_pauses_grow_to_a_bound_and_attempts_end(self, kind: type, pauses: list[float]) -> None:
        wishes = (None, "soon", "Tue, 99 Foo 2020", "-1", None)
        script = Script(*(problem(503, retry_after=wish) for wish in wishes))
        with pytest.raises(ApiProblem, match="the server is starting"):
            ask(kind, lambda client: client.item(7), script, num_attempts=5, longest_pause_seconds=1.5)
        assert len(script.requests) == 5
        # Drawn at random, up to a bound that doubles.
        assert all(0 <= pause <= bound for pause, bound in zip(pauses, (0.5, 1.0, 1.5, 1.5), strict=True))

    @both
    def test_a_server_that_is_still_starting_is_reached(self, kind: type, pauses: list[float]) -> None:
        script = Script(httpx2.ConnectError("refused"), httpx2.ConnectTimeout("late"), item())
        assert ask(kind, lambda client: client.item(7), script).id == 7
        assert len(pauses) == 2

    @both
    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (problem(500, code="server.error"), "server.error"),
            (problem(404, code="item.unknown"), "item.unknown"),
            (httpx2.ReadTimeout("late"), "no answer within 2.5 seconds"),
            (httpx2.RemoteProtocolError("peer closed"), "broke off: peer closed"),
            (httpx2.ReadError(""), "broke off: ReadError"),
        ],
    )
    def test_nothing_else_is_asked_again(
        self, kind: type, answer: httpx2.Response | Exception, error: str, pauses: list[float]
    ) -> None:
        with pytest.raises(ResourceError, match=f"{URL}.*{error}"):
            ask(kind, lambda client: client.item(7), Script(answer), timeout_seconds=2.5)
        assert not pauses

    @both
    @pytest.mark.parametrize(
        "change",
        [
            lambda client: client.add(vector=[1.0]),
            lambda client: client.replace(7, vector=[1.0]),
            lambda client: client.delete(7),
            lambda client: client.swap("v0001"),
            lambda client: client.rollback(),
            lambda client: client.compact(),
        ],
        ids=["add", "replace", "delete", "swap", "rollback", "compact"],
    )
    def test_a_change_that_may_have_been_made_is_not_asked_for_again(
        self, kind: type, change: Question, pauses: list[float]
    ) -> None:
        # As a proxy answers whose connection to the server broke off after the request had gone there.
        of_proxy = httpx2.Response(503, text="upstream connect error or disconnect/reset before headers")
        with pytest.raises(ResourceError, match="503 with text/plain"):
            ask(kind, change, Script(of_proxy))
        assert not pauses
        done = httpx2.Response(200, json={**ITEM, "current": "v0001"})
        ask(kind, change, Script(problem(503, retry_after="2", code="index.busy"), done))
        assert pauses == [2]
        # What changes nothing may be asked as often as one likes.
        assert ask(kind, lambda client: client.item(7), Script(of_proxy, item())).id == 7

    @both
    def test_a_picture_is_sent_whole_each_time(self, kind: type, pauses: list[float]) -> None:
        script = Script(problem(), httpx2.Response(200, json=SEARCH_ANSWER))
        ask(kind, lambda client: client.search(picture_bytes(), roi=(1, 2, 30, 40.5)), script)
        for request in script.requests:
            assert picture_bytes() in request.content
            assert b'name="roi"\r\n\r\n1.0,2.0,30.0,40.5\r\n' in request.content
        assert len(script.requests) == 2

    def test_tasks_at_the_same_time_each_have_their_own_attempts(self, pauses: list[float]) -> None:
        seen: dict[str, int] = {}

        async def third_time(request: httpx2.Request) -> httpx2.Response:
            seen[request.url.path] = seen.get(request.url.path, 0) + 1
            id = int(request.url.path.rpartition("/")[2])
            return problem() if seen[request.url.path] < 3 else httpx2.Response(200, json={**ITEM, "id": id})

        async def ask_all() -> list[int]:
            async with AsyncApiClient(URL, transport=httpx2.MockTransport(third_time)) as client:
                items = await asyncio.gather(*(client.item(id) for id in range(20)))
            return [item.id for item in items]

        assert asyncio.run(ask_all()) == list(range(20))
        assert set(seen.values()) == {3}

    def test_impatience_is_refused(self) -> None:
        for wrong in ({"timeout_seconds": 0}, {"num_attempts": 0}, {"longest_pause_seconds": -1}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                ApiClientSettings(**wrong)


@both
@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({}, "exactly one of image, url, id, vector and parts; found none"),
        ({"id": 1, "vector": [1.0]}, "found id and vector"),
        ({"vector": [1.0, float("nan")]}, "vector holds NaN or infinity"),
        ({"image": b"a", "roi": (0, 0, float("inf"), 1)}, "roi holds NaN or infinity"),
        ({"id": 1, "roi": (0, 0, 1, 1)}, "roi has a meaning only with image or url"),
        ({"image": b"a", "include_self": True}, "include_self has a meaning only with id"),
    ],
)
def test_a_search_that_cannot_be_meant_is_not_sent(kind: type, query: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ask(kind, lambda client: client.search(**query), Script())


@both
@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://pictures.example", "http://", "http://[::1"])
def test_what_is_no_address_is_refused_before_anything_is_sent(kind: type, url: str) -> None:
    with pytest.raises(ValueError, match="not the address of a server"):
        kind(url)


@both
@pytest.mark.parametrize("url", [f"{URL}/shop", f"{URL}/shop/"])
def test_a_server_may_live_below_a_path(kind: type, url: str) -> None:
    script = Script(item())
    ask(kind, lambda client: client.item(7), script, url=url)
    assert str(script.requests[0].url) == f"{URL}/shop/v1/items/7"


def test_both_clients_offer_the_same() -> None:
    def offered(kind: type) -> dict[str, str]:
        methods = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {name: str(inspect.signature(method)) for name, method in methods.items()}

    assert offered(ApiClient) == offered(AsyncApiClient)
    assert {"search", "search_batch", "add", "replace", "delete", "swap"} <= offered(ApiClient).keys()


def test_the_client_loads_neither_torch_nor_the_web_framework() -> None:
    program = "import sys, lookalike.api_client; print({'torch', 'faiss', 'fastapi', 'starlette'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def picture_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(file, format="PNG")
    return file.getvalue()
