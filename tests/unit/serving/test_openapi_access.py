"""Who may ask what: the OpenAPI document of a server says so, and the server does it."""

from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from lookalike.api_answers import ServerInfo, ServerRateLimit
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.problems import PROBLEM_MEDIA_TYPE
from serving.safety.key_file import add_key
from serving.settings import RateLimit, ServingSettings, UrlFetching
from tests.unit.serving.small_index import LOCAL, SmallIndex

ANYWHERE = "0.0.0.0"
HEALTH = {"/livez", "/readyz"}
# What any server of its kind documents; the codes of all routes together.
OF_KEYS = {"key.missing", "key.unknown", "key.lacks_scope"}
OF_WRITES = {"writes.off", "origin.not_allowed"}


def operations(client: TestClient) -> list[tuple[str, str, dict[str, Any]]]:
    paths = client.get("/openapi.json").json()["paths"]
    return [(method, path, operation) for path, of_path in paths.items() for method, operation in of_path.items()]


def codes_of(operation: dict[str, Any], status: str | None = None) -> set[str]:
    chosen = [answer for name, answer in operation["responses"].items() if status in (None, name)]
    return {
        code for answer in chosen for code in answer.get("content", {}).get(PROBLEM_MEDIA_TYPE, {}).get("examples", {})
    }


def require_documented(operation: dict[str, Any], answer: httpx2.Response) -> None:
    status = str(answer.status_code)
    assert answer.json()["code"] in codes_of(operation, status)
    for name, header in operation["responses"][status].get("headers", {}).items():
        assert name in answer.headers or not header["required"]
    for name in ("Retry-After", "WWW-Authenticate"):
        assert (name in answer.headers) <= (name in operation["responses"][status].get("headers", {}))


class Servers:
    def __init__(self, engine: QueryEngine, index: Path, keys: Path) -> None:
        self._engine, self._index, self._keys = engine, index, keys

    def open(self, **settings: Any) -> TestClient:
        return TestClient(create_app(self._engine, ServingSettings(index=self._index, **settings)), base_url=LOCAL)

    def with_keys(self, **settings: Any) -> tuple[TestClient, dict[str, str]]:
        """Headers of a key that reads come along."""
        key = add_key(self._keys, "shop", ("read",), today="")
        return self.open(host=ANYWHERE, keys=self._keys, **settings), {"Authorization": f"Bearer {key}"}


@pytest.fixture
def servers(engine: QueryEngine, small_index: SmallIndex, tmp_path: Path) -> Servers:
    return Servers(engine, small_index.index, tmp_path / "keys.json")


def test_routes_want_the_keys_that_they_say_they_want(servers: Servers) -> None:
    client, reader = servers.with_keys()
    schemes = client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["header"]["in"], schemes["header"]["name"]) == ("header", "X-API-Key")
    asked = operations(client)
    writing = {
        (method, path) for method, path, operation in asked if {"bearer": ["read", "write"]} in operation["security"]
    }
    assert ("delete", "/v1/items/{id}") in writing
    assert ("post", "/v1/search") not in writing
    for method, path, operation in asked:
        address = path.replace("{id}", "0")
        stranger = client.request(method, address)
        if path in HEALTH:
            assert operation["security"] == []
            assert stranger.status_code in (200, 503)
            continue
        assert stranger.status_code == 401
        require_documented(operation, stranger)
        assert all(requirement.keys() <= schemes.keys() for requirement in operation["security"])
        known = client.request(method, address, headers=reader)
        assert (known.status_code == 403) == ((method, path) in writing)
        if known.status_code == 403:
            require_documented(operation, known)


def test_whoever_asks_too_much_is_told_when_to_go_on(servers: Servers) -> None:
    client, reader = servers.with_keys(rate_limit=RateLimit(requests_per_second=0.01, burst=1))
    client.get("/v1/info", headers=reader)
    for method, path, operation in operations(client):
        if path in HEALTH:
            assert "429" not in operation["responses"]
            continue
        refused = client.request(method, path.replace("{id}", "0"), headers=reader)
        assert refused.status_code == 429
        require_documented(operation, refused)
        assert operation["responses"]["429"]["headers"]["Retry-After"]["required"]


def test_busy_servers_say_when_to_ask_again(client: TestClient) -> None:
    for _, _, operation in operations(client):
        assert operation["responses"]["503"]["headers"]["Retry-After"]["required"]


@pytest.mark.parametrize(
    ("settings", "given", "never"),
    [
        ({}, {"host.not_allowed", "writes.off"}, OF_KEYS | {"rate.exceeded", "origin.not_allowed"}),
        (
            {"allows_writes": True},
            {"host.not_allowed", "origin.not_allowed"},
            OF_KEYS | {"rate.exceeded", "writes.off"},
        ),
        ({"host": ANYWHERE, "requires_keys": False}, {"rate.exceeded", "writes.off"}, OF_KEYS | {"host.not_allowed"}),
        ({"host": ANYWHERE, "keys": True}, OF_KEYS | {"rate.exceeded"}, OF_WRITES | {"host.not_allowed"}),
    ],
    ids=["local", "local, writing", "open to everybody", "with keys"],
)
def test_what_settings_rule_out_is_not_told(
    servers: Servers, settings: dict[str, Any], given: set[str], never: set[str]
) -> None:
    client = servers.with_keys()[0] if "keys" in settings else servers.open(**settings)
    asked = operations(client)
    told = set().union(*(codes_of(operation) for _, _, operation in asked))
    assert given <= told
    assert not never & told
    # A status that is left without a problem is not there at all.
    for _, path, operation in asked:
        if path.startswith("/v1/"):
            assert ("401" in operation["responses"]) == ("key.missing" in given)
        assert "keys" in settings or "security" not in operation


def test_clients_are_told_how_much_they_may_ask_and_whether_addresses_are_taken(servers: Servers) -> None:
    limit = RateLimit(requests_per_second=7, burst=9)
    client, reader = servers.with_keys(rate_limit=limit, urls=UrlFetching(hosts=("img.example",)))
    answer = client.get("/v1/info", headers=reader)
    info = answer.json()
    assert info["rate_limit"] == {"requests_per_second": 7.0, "burst": 9}
    assert info["takes_urls"] is True
    read = TypeAdapter(ServerInfo).validate_json(answer.content)  # as the client does
    assert (read.rate_limit, read.takes_urls, read.scopes) == (ServerRateLimit(7.0, 9), True, ("read",))
    assert "img.example" not in answer.text
    assert servers.open(rate_limit=limit).get("/v1/info").json()["rate_limit"] is None
