import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient

from lookalike.errors import SettingsError
from serving.__main__ import main
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.middleware import RequestEnvelope
from serving.problems import add_problem_handlers
from serving.safety.api_keys import Gate, charge, open_keys, requires_scope
from serving.safety.key_file import KeyRing, add_key, read_keys, remove_key
from serving.settings import RateLimit, ServingSettings
from tests.unit.serving.small_index import LOCAL, SmallIndex

ANYWHERE = "0.0.0.0"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


class TestKeyFile:
    def test_holds_no_key(self, file: Path) -> None:
        key = add_key(file, "shop", ("read", "write"), today="2026-01-31")
        assert key not in file.read_text()
        (entry,) = read_keys(file)
        assert (entry.name, entry.scopes, entry.created) == ("shop", ("read", "write"), "2026-01-31")

    def test_keys_are_long_and_never_the_same(self, file: Path) -> None:
        keys = {add_key(file, f"n{number}", ("read",), today="") for number in range(20)}
        assert len(keys) == 20
        assert all(len(key) >= 43 + len("lookalike_") for key in keys)  # 256 bits, 6 to a character

    def test_finds_a_key_and_nothing_like_it(self, file: Path) -> None:
        keys = {name: add_key(file, name, ("read",), today="") for name in ("a", "b", "c")}
        ring = KeyRing(file)
        for name, key in keys.items():
            found = ring.find(key)
            assert found is not None
            assert found.name == name
            for other in (key[:-1], key + "x", key.upper(), "", read_keys(file)[0].sha256, "\udc80ä"):
                assert ring.find(other) is None

    def test_a_removed_key_ends_and_a_new_one_counts_within_a_second(self, file: Path) -> None:
        clock = Clock()
        first = add_key(file, "first", ("read",), today="")
        ring = KeyRing(file, clock=clock)
        second = add_key(file, "second", ("read",), today="")
        remove_key(file, "first")
        clock.now = 1.0
        assert ring.find(first) is None
        assert ring.find(second) is not None

    def test_a_file_broken_by_hand_changes_nothing(self, file: Path, caplog: pytest.LogCaptureFixture) -> None:
        clock = Clock()
        key = add_key(file, "shop", ("read",), today="")
        ring = KeyRing(file, clock=clock)
        for now, change in ((1.0, lambda: file.write_text("{")), (2.0, file.unlink)):
            change()
            clock.now = now
            assert ring.find(key) is not None
        assert caplog.text.count("keys stay as they were") == 2

    @pytest.mark.parametrize(
        "content", ["", "[]", '{"format_version": 2, "keys": []}', '{"format_version": 1, "keys": [{"name": "a"}]}']
    )
    def test_a_file_that_is_none_of_ours_is_refused_by_name(self, file: Path, content: str) -> None:
        file.write_text(content)
        with pytest.raises(SettingsError, match=str(file)):
            KeyRing(file)

    @pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\nb", "käse"])
    def test_names_are_plain(self, file: Path, name: str) -> None:
        with pytest.raises(SettingsError, match="named"):
            add_key(file, name, ("read",), today="")
        assert not file.exists()


class TestCommands:
    def test_add_list_and_remove(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = run(capsys, "add", "shop", "--write", "--keys", str(file))
        found = KeyRing(file).find(made["key"])
        assert found is not None
        assert found.scopes == ("read", "write")
        listed = run(capsys, "list", "--keys", str(file))["keys"]
        assert [(entry["name"], entry["scopes"]) for entry in listed] == [("shop", ["read", "write"])]
        assert found.sha256 not in json.dumps(listed)
        assert run(capsys, "remove", "shop", "--keys", str(file)) == {"removed": "shop"}
        assert run(capsys, "list", "--keys", str(file)) == {"keys": []}

    @pytest.mark.parametrize("arguments", [["add", "shop"], ["remove", "other"]])
    def test_what_cannot_be_done_is_one_line(
        self, file: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        add_key(file, "shop", ("read",), today="")
        with pytest.raises(SystemExit) as stop:
            main(["keys", *arguments, "--keys", str(file)])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(["keys", *arguments, "--json"])
    assert stop.value.code == 0
    return json.loads(capsys.readouterr().out)


class TestWhenKeysAreNeeded:
    def test_not_on_this_machine_alone(self, file: Path) -> None:
        assert open_keys(ServingSettings(index=file)) is None

    def test_where_others_reach_it(self, file: Path) -> None:
        with pytest.raises(SettingsError, match=r"other machines reach 0\.0\.0\.0.*--no-keys"):
            open_keys(ServingSettings(index=file, host=ANYWHERE))

    def test_unless_waived_by_name(self, file: Path) -> None:
        assert open_keys(ServingSettings(index=file, host=ANYWHERE, requires_keys=False)) is None

    def test_wherever_they_are_given(self, file: Path) -> None:
        add_key(file, "shop", ("read",), today="")
        assert open_keys(ServingSettings(index=file, keys=file)) is not None

    @pytest.mark.parametrize(
        "contradiction", [{"keys": "keys.json", "requires_keys": False}, {"requires_keys": True, "allows_writes": True}]
    )
    def test_contradictions_are_refused(self, contradiction: dict[str, Any]) -> None:
        with pytest.raises(SettingsError):
            open_keys(ServingSettings.model_validate({"index": "index", **contradiction}))


class TestServerWithKeys:
    @pytest.fixture
    def key(self, file: Path) -> str:
        return add_key(file, "shop", ("read",), today="")

    @pytest.fixture
    def client(self, engine: QueryEngine, small_index: SmallIndex, file: Path, key: str) -> TestClient:
        return TestClient(create_app(engine, ServingSettings(index=small_index.index, host=ANYWHERE, keys=file)))

    def test_everything_but_the_page_and_the_health_checks_needs_one(self, client: TestClient, key: str) -> None:
        for path in ("/", "/page/page.js", "/livez", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/v1/info", "/v1/items", "/v1/items/0/image", "/metrics", "/nothing", "/page", "//v1/info"):
            refused = client.get(path)
            assert code(refused) == (401, "key.missing")
            assert refused.headers["www-authenticate"] == 'Bearer realm="lookalike"'
        assert client.get("/v1/info", headers=bearer(key)).status_code == 200
        assert client.get("/v1/info", headers={"X-API-Key": key}).status_code == 200
        assert client.post("/v1/search", json={"id": 1}, headers=bearer(key)).status_code == 200

    @pytest.mark.parametrize("wrong", ["guess", "", "é" * 50, "a" * 100_000])
    def test_a_wrong_key_is_refused(self, client: TestClient, wrong: str) -> None:
        answer = client.get("/v1/info", headers={"Authorization": f"Bearer {wrong}".encode()})
        assert code(answer) == (401, "key.unknown")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        assert wrong == "" or wrong not in answer.text

    def test_another_scheme_is_no_key(self, client: TestClient, key: str) -> None:
        assert code(client.get("/v1/info", headers={"Authorization": f"Basic {key}"})) == (401, "key.missing")

    def test_a_cookie_is_no_key(self, client: TestClient, key: str) -> None:
        # Browsers send cookies along whichever site made them ask.
        cookie = {"Cookie": f"theme=dark; lookalike_key={key}"}
        assert code(client.get("/v1/items/0/image", headers=cookie)) == (401, "key.missing")
        assert code(client.post("/v1/search", json={"id": 1}, headers=cookie)) == (401, "key.missing")

    def test_whatever_changes_something_takes_a_key_that_may(self, client: TestClient, key: str) -> None:
        searches = {"/v1/search", "/v1/search:batch"}
        paths = client.get("/openapi.json").json()["paths"]
        asked = [
            (method, path)
            for path, operations in paths.items()
            for method in operations
            if method != "get" and path not in searches
        ]
        assert ("delete", "/v1/items/{id}") in asked
        for method, path in asked:
            answer = client.request(method, path.replace("{id}", "0"), headers=bearer(key))
            assert code(answer) == (403, "key.lacks_scope"), (method, path)

    def test_the_body_of_a_stranger_is_not_read(self, client: TestClient) -> None:
        async def receive() -> Any:
            pytest.fail("the body was asked for")

        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/search", "query_string": b"", "headers": []}
        asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
        assert messages[0]["status"] == 401


def small_app(**settings: Any) -> TestClient:
    """Two routes behind the gate: one reads, one writes."""
    complete = ServingSettings.model_validate({"index": "index", **settings})
    app = FastAPI()
    add_problem_handlers(app)

    @app.get("/read")
    async def read(request: Request, num_queries: int = 1) -> str:
        charge(request, num_queries)
        return "read"

    @app.post("/write", dependencies=[Depends(requires_scope("write"))])
    async def write() -> str:
        return "written"

    app.add_middleware(Gate, settings=complete, keys=open_keys(complete))
    app.add_middleware(RequestEnvelope)
    return TestClient(app, base_url=LOCAL)


class TestScopes:
    def test_writing_takes_a_key_that_may(self, file: Path) -> None:
        reader = add_key(file, "reader", ("read",), today="")
        writer = add_key(file, "writer", ("read", "write"), today="")
        client = small_app(keys=file)
        refused = client.post("/write", headers=bearer(reader))
        assert code(refused) == (403, "key.lacks_scope")
        assert 'error="insufficient_scope", scope="write"' in refused.headers["www-authenticate"]
        assert client.post("/write", headers=bearer(writer)).json() == "written"
        assert code(client.post("/write")) == (401, "key.missing")

    def test_a_key_that_may_only_write_reads_nothing(self, file: Path) -> None:
        writer = add_key(file, "writer", ("write",), today="")
        refused = small_app(keys=file).get("/read", headers=bearer(writer))
        assert code(refused) == (403, "key.lacks_scope")
        assert 'error="insufficient_scope", scope="read"' in refused.headers["www-authenticate"]

    def test_a_page_of_another_site_may_send_a_key_that_it_knows(self, file: Path) -> None:
        writer = add_key(file, "writer", ("read", "write"), today="")
        headers = {**bearer(writer), "Origin": "https://shop.example"}
        assert small_app(keys=file).post("/write", headers=headers).json() == "written"

    def test_without_keys_writing_is_off(self) -> None:
        assert code(small_app().post("/write")) == (403, "writes.off")

    def test_without_keys_writing_can_be_allowed(self) -> None:
        assert small_app(allows_writes=True).post("/write").json() == "written"
        assert small_app(allows_writes=True).post("/write", headers={"Origin": LOCAL}).json() == "written"

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:81"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": LOCAL},
        ],
    )
    def test_even_then_no_other_site_makes_a_browser_write(self, headers: dict[str, str]) -> None:
        assert code(small_app(allows_writes=True).post("/write", headers=headers)) == (403, "origin.not_allowed")


SLOW = RateLimit(requests_per_second=0.01, burst=3)


class TestRates:
    def test_each_key_has_its_own(self, file: Path) -> None:
        first, second = (add_key(file, name, ("read",), today="") for name in ("first", "second"))
        client = small_app(keys=file, rate_limit=SLOW)
        for key in (first, second):
            assert [client.get("/read", headers=bearer(key)).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = client.get("/read", headers=bearer(first))
        assert code(refused) == (429, "rate.exceeded")
        assert 90 <= int(refused.headers["retry-after"]) <= 100

    def test_a_batch_counts_as_its_queries(self, file: Path) -> None:
        key = add_key(file, "shop", ("read",), today="")
        client = small_app(keys=file, rate_limit=SLOW)
        assert client.get("/read?num_queries=2", headers=bearer(key)).status_code == 200
        assert code(client.get("/read?num_queries=2", headers=bearer(key))) == (429, "rate.exceeded")

    def test_trying_keys_is_held_up(self, file: Path) -> None:
        key = add_key(file, "shop", ("read",), today="")
        client = small_app(keys=file, rate_limit=SLOW)
        tries = [client.get("/read", headers=bearer(f"guess{number}")).status_code for number in range(4)]
        assert tries == [401, 401, 401, 429]
        # Who has a key is not held up by who has none.
        assert client.get("/read", headers=bearer(key)).status_code == 200

    def test_without_keys_each_address_has_its_own_unless_all_are_this_machine(self) -> None:
        public = small_app(host=ANYWHERE, requires_keys=False, rate_limit=SLOW)
        assert [public.get("/read").status_code for _ in range(4)] == [200, 200, 200, 429]
        local = small_app(rate_limit=SLOW)
        assert {local.get("/read").status_code for _ in range(9)} == {200}
