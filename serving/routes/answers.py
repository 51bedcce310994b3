"""What the engine found -> the bytes of an answer.

Answers are not checked against their models when they are written: for a hundred hits that takes longer than to search.
The tests check them.
"""

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
from fastapi import Request, Response
from jaxtyping import Float32
from numpy import ndarray
from pydantic_core import to_json

from serving.engine.queries import Answer, Hit, Item
from serving.schemas.search import Extra


def json_answer(tree: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Metadata may hold anything that a table can: dates, bytes, NaN."""
    content = to_json(tree, bytes_mode="base64", inf_nan_mode="null", fallback=str)
    return Response(content, status, headers, media_type="application/json")


def search_answer(answer: Answer, request: Request, include: Iterable[Extra]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "request_id": request.state.request_id,
        "index_version": answer.index_version,
        "encoder_fingerprint": answer.encoder_fingerprint,
    }
    if "timings" in include:
        tree["timings_ms"] = answer.timings_ms
    root, has_metadata = _root(request), "metadata" in include
    tree["hits"] = [_hit(hit, root, has_metadata=has_metadata) for hit in answer.hits]
    return tree


def item_answer(item: Item, request: Request) -> dict[str, Any]:
    return {"id": item.id, **_about(item, _root(request))}


def item_address(identifier: int, request: Request) -> str:
    return f"{_root(request)}/v1/items/{identifier}"


def _hit(hit: Hit, root: str, *, has_metadata: bool) -> dict[str, Any]:
    tree: dict[str, Any] = {"id": hit.item.id, "score": hit.score}
    if has_metadata:
        tree |= _about(hit.item, root)
    if hit.vector is not None:
        tree["vector"] = _base64_of(hit.vector)
    return tree


def _about(item: Item, root: str) -> dict[str, Any]:
    has_picture = item.picture is not None
    return {
        "key": item.key,
        "class_name": item.class_name,
        "width": item.width,
        "height": item.height,
        "metadata": item.metadata,
        "image_url": f"{root}/v1/items/{item.id}/image?picture={item.picture}" if has_picture else None,
    }


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", ""))


def _base64_of(vector: Float32[ndarray, "dim"]) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
