"""Every question that a server can be asked: how it is sent, and how its answer is read."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import httpx2

from lookalike.api_answers import IndexVersions, Item, ItemPage, SearchAnswer, ServerInfo
from lookalike.api_client.exchange import (
    ApiProblem,
    Call,
    batch_results,
    current_version,
    is_ready,
    no_value,
    picture,
    value_reader,
)
from lookalike.api_client.queries import JsonObject, Numbers, SearchQuery, written_vector

PictureSize = Literal["original", "thumbnail"]
# A swap takes as long as opening the version does, and a compaction as long as building an index.
_PATIENT = {"timeout": httpx2.Timeout(30.0, read=None)}


def info() -> Call[ServerInfo]:
    return Call("GET", "v1/info", value_reader(ServerInfo))


def search(query: SearchQuery) -> Call[SearchAnswer]:
    return Call("POST", "v1/search", value_reader(SearchAnswer), query.content())


def search_batch(queries: Sequence[SearchQuery]) -> Call[tuple[SearchAnswer | ApiProblem, ...]]:
    content = {"json": {"searches": [query.tree() for query in queries]}}
    return Call("POST", "v1/search:batch", batch_results, content)


def item(id: int) -> Call[Item]:
    return Call("GET", _path(id), value_reader(Item))


def items(after_id: int | None, limit: int | None, condition: JsonObject | None) -> Call[ItemPage]:
    params: dict[str, Any] = {"after_id": after_id, "limit": limit}
    params["filter"] = None if condition is None else json.dumps(condition)
    given = {name: value for name, value in params.items() if value is not None}
    return Call("GET", "v1/items", value_reader(ItemPage), {"params": given})


def random_items(count: int, seed: int | None) -> Call[ItemPage]:
    params = {"sample": count} if seed is None else {"sample": count, "seed": seed}
    return Call("GET", "v1/items", value_reader(ItemPage), {"params": params})


def add(
    image: bytes | None, vector: Numbers | None, metadata: JsonObject | None, id: int | None, replace: bool
) -> Call[Item]:
    if replace and id is None:
        raise ValueError("replace has a meaning only with id")
    fields: dict[str, Any] = {} if id is None else {"id": int(id), "replace": replace}
    content = _item_content(image, vector, metadata, fields)
    return Call("POST", "v1/items", value_reader(Item), content, is_change=True)


def replace(id: int, image: bytes | None, vector: Numbers | None, metadata: JsonObject | None) -> Call[Item]:
    return Call("PUT", _path(id), value_reader(Item), _item_content(image, vector, metadata, {}), is_change=True)


def delete(id: int) -> Call[None]:
    return Call("DELETE", _path(id), no_value, is_change=True)


def item_image(id: int, size: PictureSize) -> Call[bytes]:
    return Call("GET", f"{_path(id)}/image", picture, {"params": {"size": size}})


def versions() -> Call[IndexVersions]:
    return Call("GET", "v1/indexes", value_reader(IndexVersions))


def swap(version: str) -> Call[str]:
    content = {"json": {"version": version}, **_PATIENT}
    return Call("POST", "v1/indexes:swap", current_version, content, is_change=True)


def rollback() -> Call[str]:
    return Call("POST", "v1/indexes:rollback", current_version, _PATIENT, is_change=True)


def compact() -> Call[str]:
    return Call("POST", "v1/indexes:compact", current_version, _PATIENT, is_change=True)


def readiness() -> Call[bool]:
    return Call("GET", "readyz", is_ready, is_asked_again=False)


def _path(id: int) -> str:
    return f"v1/items/{int(id)}"


def _item_content(
    image: bytes | None, vector: Numbers | None, metadata: JsonObject | None, fields: dict[str, Any]
) -> dict[str, Any]:
    if (image is None) == (vector is None):
        raise ValueError(f"give exactly one of image and vector; found {'none' if image is None else 'both'}")
    if vector is not None:
        described: dict[str, Any] = {} if metadata is None else {"metadata": dict(metadata)}
        return {"json": {**fields, **described, "vector": written_vector(vector)}}
    described = {} if metadata is None else {"metadata": json.dumps(metadata)}
    return {"files": {"image": ("image", image)}, "data": {**fields, **described}}
