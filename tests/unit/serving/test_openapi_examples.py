"""Every example of the OpenAPI document is sent to a real server, which must take it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient

# Deletions last, and a version to go back to before going back.
_ORDER = ("get", "post", "put", "delete")
_LATER = ("/v1/indexes:compact", "/v1/indexes:rollback")
# Their body is shown by a schema alone: JSON holds no files.
_FORMS = ("multipart/form-data", "application/octet-stream")


@dataclass(frozen=True)
class Example:
    name: str
    method: str
    path: str
    params: dict[str, Any]
    body: Any = None


def examples(document: dict[str, Any]) -> Iterator[Example]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parameters = operation.get("parameters", [])
            shown = {p["name"]: p["schema"]["examples"][0] for p in parameters if "examples" in p["schema"]}
            place = path.format(**{p["name"]: shown.get(p["name"]) for p in parameters if p["in"] == "path"})
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                for name, example in body["examples"].items():
                    yield Example(name, method, place, {}, example["value"])
                continue
            queries = [p["name"] for p in parameters if p["in"] == "query" and p["name"] in shown]
            yield Example("alone", method, place, {})
            for name in queries:
                yield Example(name, method, place, {name: shown[name]})


def order(example: Example) -> tuple[int, int]:
    later = _LATER.index(example.path) + 1 if example.path in _LATER else 0
    return later, _ORDER.index(example.method)


def lengthened(tree: Any, dim: int) -> Any:
    """The document's vectors are short, to be read; those of an index are longer."""
    if isinstance(tree, dict):
        return {
            name: [*value, *[0.0] * (dim - len(value))] if name == "vector" else lengthened(value, dim)
            for name, value in tree.items()
        }
    return [lengthened(value, dim) for value in tree] if isinstance(tree, list) else tree


def test_every_example_is_taken(writing_client: TestClient, subtests: pytest.Subtests) -> None:
    document = writing_client.get("/openapi.json").json()
    dim = writing_client.get("/v1/info").json()["dim"]
    asked = sorted(examples(document), key=order)
    assert len(asked) > 25
    for example in asked:
        with subtests.test(f"{example.method} {example.path}: {example.name}"):
            body = {} if example.body is None else {"json": lengthened(example.body, dim)}
            answer = writing_client.request(example.method, example.path, params=example.params, **body)
            assert 200 <= answer.status_code < 300, answer.text
            for result in answer.json().get("results", []) if answer.content[:1] == b"{" else []:
                assert "answer" in result


def test_every_operation_has_examples_for_what_it_needs(writing_client: TestClient) -> None:
    document = writing_client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                if parameter.get("required"):
                    assert parameter["schema"]["examples"], (method, path, parameter["name"])
            for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
                assert media_type in _FORMS or body["examples"], (method, path, media_type)


def test_what_writes_says_that_another_site_is_refused(writing_client: TestClient) -> None:
    document = writing_client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/v1/") and not path.startswith("/v1/search") and method != "get":
                shown = operation["responses"]["403"]["content"]["application/problem+json"]["examples"]
                assert shown.keys() == {"origin.not_allowed"}, (method, path)
