"""The API under /v1, and the two health checks."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from lookalike.artifacts import versions
from lookalike.records import SearchParameters
from serving.problems import Problem, invalid_field, problem_responses
from serving.query_engine import Item, QueryEngine
from serving.request_bodies import read_search_request
from serving.schemas import (
    EXAMPLE_PICTURE,
    LARGEST_ID,
    HealthAnswer,
    HitAnswer,
    InfoAnswer,
    ItemAnswer,
    ItemsAnswer,
    LimitsAnswer,
    SearchAnswer,
)
from serving.settings import MOST_ITEMS, ServingLimits

# A picture's address names its shards, so what it shows never changes.
_CACHE_FOREVER = "private, max-age=31536000, immutable"
_SHOWS_PICTURES_ONLY = "default-src 'none'; sandbox"
_LARGEST_SEED = 2**32 - 1

_SEARCH_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/SearchRequest"},
            "examples": {
                "by a picture of the index": {"value": {"id": 0, "k": 5}},
                "by any picture": {"value": {"image": EXAMPLE_PICTURE, "k": 5, "exact": True}},
                "by a region of any picture": {"value": {"image": EXAMPLE_PICTURE, "roi": [2, 2, 14, 12.5], "k": 5}},
                "by a vector": {"value": {"vector": [0.6, -0.8], "k": 5}},
            },
        },
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/SearchForm"}},
    },
}


async def _engine_of(request: Request) -> QueryEngine:
    return request.app.state.engine


async def _limits_of(request: Request) -> ServingLimits:
    return request.app.state.limits


Engine = Annotated[QueryEngine, Depends(_engine_of)]
Limits = Annotated[ServingLimits, Depends(_limits_of)]
IdInPath = Annotated[int, Path(ge=0, le=LARGEST_ID, description="As in a hit.", examples=[0])]

api = APIRouter(prefix="/v1", responses=problem_responses("host.not_allowed", "server.error"))
health = APIRouter(tags=["health"], responses=problem_responses("host.not_allowed"))


@api.post(
    "/search",
    tags=["search"],
    openapi_extra={"requestBody": _SEARCH_BODY},
    responses=problem_responses(
        "request.malformed",
        "item.unknown",
        "body.too_large",
        "image.too_many_pixels",
        "body.unsupported_type",
        "image.not_an_image",
        "image.format_not_allowed",
        "request.invalid",
        "image.empty",
        "image.truncated",
        "image.absurd_size",
        "image.undecodable",
        "roi.empty",
        "roi.outside",
        "vector.wrong_dim",
        "vector.not_finite",
        "vector.no_direction",
    ),
)
async def search(request: Request, engine: Engine, limits: Limits) -> SearchAnswer:
    """The nearest pictures to a picture or a region of it, a picture of the index, or a vector."""
    query = await read_search_request(request, limits)
    parameters = SearchParameters(k=query.k, exact=query.exact)
    if query.image is not None:
        answer = await engine.search_by_picture(query.image, parameters, roi=query.roi)
    elif query.vector is not None:
        answer = await engine.search_by_vector(query.vector, parameters)
    else:
        assert query.id is not None
        answer = await engine.search_by_id(query.id, parameters, includes_query=query.include_self)
    return SearchAnswer(
        request_id=request.state.request_id,
        index_version=answer.index_version,
        encoder_fingerprint=answer.encoder_fingerprint,
        timings_ms=answer.timings_ms,
        hits=[HitAnswer(score=hit.score, **_item_fields(hit.item, request, engine)) for hit in answer.hits],
    )


@api.get("/items", tags=["items"], responses=problem_responses("request.invalid"))
async def random_items(
    request: Request,
    engine: Engine,
    limits: Limits,
    sample: Annotated[
        int, Query(ge=1, le=MOST_ITEMS, description="How many; see `limits.max_items` of /v1/info.")
    ] = 24,
    seed: Annotated[
        int | None, Query(ge=0, le=_LARGEST_SEED, description="Gives the same pictures again; random where absent.")
    ] = None,
) -> ItemsAnswer:
    """Random pictures of the gallery."""
    if sample > limits.max_items:
        raise invalid_field("sample", f"this server gives at most {limits.max_items} items, {sample} were asked for")
    chosen_seed = secrets.randbelow(_LARGEST_SEED) if seed is None else seed
    items = await engine.random_items(sample, seed=chosen_seed)
    return ItemsAnswer(seed=chosen_seed, items=[ItemAnswer(**_item_fields(item, request, engine)) for item in items])


@api.get("/items/{id}", tags=["items"], responses=problem_responses("item.unknown", "request.invalid"))
async def item(id: IdInPath, request: Request, engine: Engine) -> ItemAnswer:
    """One picture of the gallery."""
    return ItemAnswer(**_item_fields(await engine.item(id), request, engine))


@api.get(
    "/items/{id}/image",
    tags=["items"],
    response_class=Response,
    responses={
        200: {"description": "The original file", "content": {"image/*": {}}},
        304: {"description": "The client's copy is still right"},
        **problem_responses("item.unknown", "pictures.unavailable", "request.invalid"),
    },
)
async def item_image(
    id: IdInPath,
    request: Request,
    engine: Engine,
    shards: Annotated[str | None, Query(max_length=64, description="As in `image_url`; lets clients cache.")] = None,
) -> Response:
    """The original bytes of a picture, straight from the shards."""
    current = _shards_version(engine)
    headers = {
        "ETag": f'"{current}-{id}"',
        "Cache-Control": _CACHE_FOREVER if shards is not None and shards == current else "no-cache",
        "Content-Security-Policy": _SHOWS_PICTURES_ONLY,
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        await engine.item(id)
        return Response(status_code=304, headers=headers)
    picture = await engine.original_picture(id)
    return Response(picture.data, media_type=picture.media_type, headers=headers)


@api.get("/info", tags=["info"])
async def info(engine: Engine, limits: Limits) -> InfoAnswer:
    """What is served, by what, within which limits."""
    index = engine.index
    details = index.manifest.details
    return InfoAnswer(
        index_version=index.version,
        index_fingerprint=index.fingerprint,
        index_type=details["type"],
        encoder_fingerprint=engine.encoder_fingerprint,
        num_vectors=index.num_vectors,
        dim=index.dim,
        default_num_probes=details["default_num_probes"],
        recall_curve=details["recall_curve"],
        has_pictures=engine.shards is not None,
        limits=LimitsAnswer(**limits.model_dump()),
        versions=versions(),
    )


@health.get("/livez")
async def livez() -> HealthAnswer:
    """The process answers."""
    return HealthAnswer()


@health.get("/readyz", responses=problem_responses("server.not_ready"))
async def readyz(request: Request) -> HealthAnswer:
    """The server takes queries."""
    if not request.app.state.is_ready:
        raise Problem("server.not_ready", "the server is starting or stopping", headers={"Retry-After": "1"})
    return HealthAnswer()


def _item_fields(item: Item, request: Request, engine: QueryEngine) -> dict[str, Any]:
    root, version = request.scope.get("root_path", ""), _shards_version(engine)
    return {
        "id": item.id,
        "key": item.key,
        "class_name": item.class_name,
        "width": item.width,
        "height": item.height,
        "image_url": f"{root}/v1/items/{item.id}/image?shards={version}" if version else None,
    }


def _shards_version(engine: QueryEngine) -> str | None:
    return engine.shards.fingerprint[:12] if engine.shards is not None else None
