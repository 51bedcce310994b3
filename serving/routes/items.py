"""/v1/items: the pictures of the gallery."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from lookalike.errors import ArtifactError, ResourceError
from serving.engine.errors import EncoderUnavailableError, OverloadedError, UnknownItemError
from serving.engine.queries import Item
from serving.engine.query_engine import QueryEngine
from serving.problems import Problem, invalid_field
from serving.request_bodies import parsed_json, read_new_item, read_replacing_item
from serving.routes.answers import item_address, item_answer, json_answer
from serving.routes.search import filter_of
from serving.routes.state import FOR_WRITERS, WRITING_PROBLEMS, Engine, IdInPath, Limits, problems
from serving.schemas.fields import EXAMPLE_PICTURE, LARGEST_ID
from serving.schemas.items import ItemAnswer, ItemsAnswer, NewItem
from serving.settings import MOST_ITEMS

router = APIRouter(prefix="/items", tags=["items"])

THUMBNAIL_SIDE = 320
# The address of a picture names what it shows, which then never changes.
_CACHE_FOREVER = "private, max-age=31536000, immutable"
_SHOWS_PICTURES_ONLY = "default-src 'none'; sandbox"
_LARGEST_SEED = 2**32 - 1
_DEFAULT_ITEMS = 24
_LONGEST_FILTER = 100_000
_PICTURE_PROBLEMS = (
    "request.malformed",
    "body.too_slow",
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
    "vector.wrong_dim",
    "vector.not_finite",
    "vector.no_direction",
    "item.unfit",
    "encoder.unavailable",
    "server.overloaded",
    *WRITING_PROBLEMS,
)


def _body(schema: str, form: str, examples: dict[str, object]) -> dict[str, object]:
    reference = "#/components/schemas/"
    in_json = {"schema": {"$ref": reference + schema}, "examples": {name: {"value": e} for name, e in examples.items()}}
    in_form = {"schema": {"$ref": reference + form}}
    content = {"application/json": in_json, "multipart/form-data": in_form}
    return {"requestBody": {"required": True, "content": content}}


@router.get(
    "",
    responses={
        200: {"model": ItemsAnswer, "description": "Some pictures"},
        **problems("request.invalid", "filter.invalid", "server.overloaded"),
    },
)
async def list_items(
    request: Request,
    engine: Engine,
    limits: Limits,
    after_id: Annotated[
        int | None,
        Query(ge=-1, le=LARGEST_ID, description="Lists ids above this one; absent: from the first.", examples=[0]),
    ] = None,
    limit: Annotated[
        int | None,
        Query(ge=1, le=MOST_ITEMS, description="How many; see `limits.max_items` of /v1/info.", examples=[5]),
    ] = None,
    filter: Annotated[
        str | None,
        Query(
            max_length=_LONGEST_FILTER,
            description="Lists only pictures whose metadata fit this condition, in JSON as in a search.",
            examples=['{"column": "key", "equals": "a"}'],
        ),
    ] = None,
    sample: Annotated[
        int | None, Query(ge=1, le=MOST_ITEMS, description="So many random pictures, in place of a list.")
    ] = None,
    seed: Annotated[
        int | None,
        Query(ge=0, le=_LARGEST_SEED, description="With `sample`: gives the same pictures again; random where absent."),
    ] = None,
) -> Response:
    """Pictures of the gallery: page by page in ascending order of ids, or some at random."""
    for name, count in (("limit", limit), ("sample", sample)):
        if count is not None and count > limits.max_items:
            raise invalid_field(name, f"this server gives at most {limits.max_items} items, {count} were asked for")
    if sample is not None:
        for name, value in (("after_id", after_id), ("limit", limit), ("filter", filter)):
            if value is not None:
                raise invalid_field(name, "has no meaning with sample")
        chosen_seed = secrets.randbelow(_LARGEST_SEED) if seed is None else seed
        drawn = await engine.random_items(sample, seed=chosen_seed)
        return json_answer(
            {"items": [item_answer(item, request) for item in drawn], "next_after_id": None, "seed": chosen_seed}
        )
    if seed is not None:
        raise invalid_field("seed", "has a meaning only with sample")
    wanted = min(_DEFAULT_ITEMS, limits.max_items) if limit is None else limit
    condition = None if filter is None else filter_of(parsed_json("filter", filter))
    # One more than is shown tells whether there is another page.
    found = await engine.items(after_id=-1 if after_id is None else after_id, limit=wanted + 1, filter=condition)
    items = [item_answer(item, request) for item in found[:wanted]]
    next_after_id = items[-1]["id"] if len(found) > wanted else None
    return json_answer({"items": items, "next_after_id": next_after_id, "seed": None})


@router.post(
    "",
    status_code=201,
    dependencies=FOR_WRITERS,
    openapi_extra=_body(
        "NewItem",
        "NewItemForm",
        {
            "a picture": {"image": EXAMPLE_PICTURE, "metadata": {"key": "shop/1"}},
            "a vector": {"vector": [0.6, -0.8]},
            "under an id of its own": {"image": EXAMPLE_PICTURE, "id": 1000, "replace": True},
        },
    ),
    responses={
        200: {"model": ItemAnswer, "description": "It took the place of another one"},
        201: {
            "model": ItemAnswer,
            "description": "It was added",
            "headers": {"Location": {"description": "Where it is", "schema": {"type": "string"}}},
        },
        **problems("item.exists", *_PICTURE_PROBLEMS),
    },
)
async def add_item(request: Request, engine: Engine, limits: Limits) -> Response:
    """Adds a picture, or a vector alone. It is on the disk before this answers, and the next search finds it."""
    new = await read_new_item(request, limits)
    with _unwritable_named():
        added, is_new = await _add_or_replace(engine, new)
    headers = {"Location": item_address(added.id, request)}
    return json_answer(item_answer(added, request), status=201 if is_new else 200, headers=headers)


@router.put(
    "/{id}",
    dependencies=FOR_WRITERS,
    openapi_extra=_body(
        "ReplacingItem", "ReplacingItemForm", {"a picture": {"image": EXAMPLE_PICTURE, "metadata": {"key": "shop/1"}}}
    ),
    responses={
        200: {"model": ItemAnswer, "description": "What is there now"},
        **problems("item.unknown", *_PICTURE_PROBLEMS),
    },
)
async def replace_item(id: IdInPath, request: Request, engine: Engine, limits: Limits) -> Response:
    """Puts another picture, and other metadata, in the place of one. As durable as an addition."""
    new = await read_replacing_item(request, limits)
    with _unwritable_named():
        item = await engine.replace(id, picture=new.image, vector=new.vector, metadata=new.metadata)
    return json_answer(item_answer(item, request))


@router.get(
    "/{id}",
    responses={
        200: {"model": ItemAnswer, "description": "The picture"},
        **problems("item.unknown", "request.invalid", "server.overloaded"),
    },
)
async def item(id: IdInPath, request: Request, engine: Engine) -> Response:
    """One picture of the gallery."""
    return json_answer(item_answer(await engine.item(id), request))


@router.delete(
    "/{id}",
    status_code=204,
    dependencies=FOR_WRITERS,
    responses={
        204: {"description": "It is gone"},
        **problems("item.unknown", "request.invalid", "server.overloaded", *WRITING_PROBLEMS),
    },
)
async def delete_item(id: IdInPath, engine: Engine) -> Response:
    """Takes a picture out. As durable as an addition, and no search that begins later finds it."""
    with _unwritable_named():
        await engine.delete(id)
    return Response(status_code=204)


@router.get(
    "/{id}/image",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": {"image/*": {}}},
        304: {"description": "The client's copy is still right"},
        **problems(
            "item.unknown",
            "pictures.unavailable",
            "request.invalid",
            "image.undecodable",
            "image.truncated",
            "server.overloaded",
        ),
    },
)
async def item_image(
    id: IdInPath,
    request: Request,
    engine: Engine,
    size: Annotated[
        Literal["original", "thumbnail"],
        Query(
            description=f"`original`: the file as it was added; `thumbnail`: a JPEG within {THUMBNAIL_SIDE} pixels.",
            examples=["thumbnail"],
        ),
    ] = "original",
    picture: Annotated[str | None, Query(max_length=64, description="As in `image_url`; lets clients cache.")] = None,
) -> Response:
    """The picture behind an item."""
    is_original = size == "original"
    file = await (engine.original(id) if is_original else engine.thumbnail(id, side=THUMBNAIL_SIDE))
    # Those of shards have such tags; of others, more than the address would have to say which bytes are meant.
    is_named = file.tag == (f"{picture}-{id}" if is_original else f"{picture}-{id}-{THUMBNAIL_SIDE}")
    headers = {
        "ETag": f'"{file.tag}"',
        "Cache-Control": _CACHE_FOREVER if is_named else "no-cache",
        "Content-Security-Policy": _SHOWS_PICTURES_ONLY,
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)


async def _add_or_replace(engine: QueryEngine, new: NewItem) -> tuple[Item, bool]:
    """The item, and whether its id is new."""
    if new.id is not None and new.replace:
        try:
            replaced = await engine.replace(new.id, picture=new.image, vector=new.vector, metadata=new.metadata)
            return replaced, False
        except UnknownItemError:
            # Who adds the same id at this very moment is told of a conflict, as without `replace`.
            pass
    return await engine.add(picture=new.image, vector=new.vector, metadata=new.metadata, id=new.id), True


@contextmanager
def _unwritable_named() -> Iterator[None]:
    try:
        yield
    except (OverloadedError, EncoderUnavailableError):
        raise
    # Changes are made for the version that is current on the disk, which may be one that cannot be opened.
    except (ResourceError, ArtifactError) as error:
        raise Problem("index.busy", str(error), headers={"Retry-After": "1"}) from error
