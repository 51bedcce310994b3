"""The OpenAPI document: what the framework writes of the routes, and what it cannot know of them.

It describes the server that it comes from: one without keys neither asks for one nor refuses any.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from serving.addresses import is_loopback
from serving.problems import PROBLEM_KINDS, PROBLEM_MEDIA_TYPE
from serving.schemas.documented import DOCUMENTED_MODELS
from serving.settings import ServingSettings

_KEY_SCHEMES: dict[str, dict[str, Any]] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, made by `lookalike serve keys add`, with the scope `read`, maybe `write` besides.",
    },
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_HEADERS: dict[str, dict[str, Any]] = {
    "Retry-After": {"description": "How many seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "What key is wanted (RFC 6750).", "schema": {"type": "string"}},
    "Accept-Post": {"description": "The types that are read.", "schema": {"type": "string"}},
}


def complete_openapi(app: FastAPI, settings: ServingSettings, *, requires_keys: bool) -> None:
    """Adds the models that routes refer to by name, because they read their bodies themselves; who may ask; and the
    headers of problems. Takes out the problems that this server's settings rule out."""
    generate, ruled_out = app.openapi, _ruled_out(settings, requires_keys=requires_keys)

    def complete() -> dict[str, Any]:
        is_complete = app.openapi_schema is not None
        document = generate()
        if not is_complete:
            _, definitions = models_json_schema(DOCUMENTED_MODELS, ref_template="#/components/schemas/{model}")
            document["components"]["schemas"].update(definitions["$defs"])
            if requires_keys:
                document["components"]["securitySchemes"] = _KEY_SCHEMES
            for operation in _operations(document):
                if requires_keys:
                    operation["security"] = _security(operation["responses"])
                _complete_responses(operation["responses"], ruled_out)
        return document

    app.openapi = complete  # type: ignore[method-assign]


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        yield from operations.values()


def _security(responses: dict[str, Any]) -> list[dict[str, list[str]]]:
    """Of a route, told by the problems that it can end in; either scheme will do, none where it is public."""
    codes = {code for response in responses.values() for code in _examples(response)}
    if "key.missing" not in codes:
        return []
    scopes = ["read", "write"] if "writes.off" in codes else ["read"]
    return [{scheme: scopes} for scheme in _KEY_SCHEMES]


def _ruled_out(settings: ServingSettings, *, requires_keys: bool) -> set[str]:
    """As `serving.safety.api_keys` and `serving.middleware.KnownHosts` decide."""
    is_local = is_loopback(settings.host)
    codes = {"writes.off", "origin.not_allowed"} if requires_keys else {"key.missing", "key.unknown", "key.lacks_scope"}
    codes.add("writes.off" if settings.allows_writes else "origin.not_allowed")
    if not is_local:
        codes.add("host.not_allowed")
    elif not requires_keys:
        codes.add("rate.exceeded")
    return codes


def _complete_responses(responses: dict[str, Any], ruled_out: set[str]) -> None:
    for status, response in list(responses.items()):
        examples = _examples(response)
        if not examples:
            continue
        for code in ruled_out & examples.keys():
            del examples[code]
        if not examples:
            del responses[status]
            continue
        headers = {PROBLEM_KINDS[code].header for code in examples}
        for name in _HEADERS.keys() & headers:
            response.setdefault("headers", {})[name] = {**_HEADERS[name], "required": len(headers) == 1}


def _examples(response: dict[str, Any]) -> dict[str, Any]:
    """Code -> example; empty where the response is no problem."""
    found: dict[str, Any] = response.get("content", {}).get(PROBLEM_MEDIA_TYPE, {}).get("examples", {})
    return found
