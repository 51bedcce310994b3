"""POST /v1/search and /v1/search:batch."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from lookalike.errors import LookalikeError
from lookalike.filters import Filter, parse_filter
from lookalike.records import SearchParameters
from serving.engine.errors import OverloadedError
from serving.engine.queries import Answer, QueryPart, SearchQuery
from serving.problems import Problem, problem_details, problem_of
from serving.request_bodies import ADDRESS_FIELDS, read_batch, read_search
from serving.routes.answers import json_answer, search_answer
from serving.routes.state import Engine, Limits, problems
from serving.safety.api_keys import charge
from serving.schemas.fields import EXAMPLE_PICTURE
from serving.schemas.search import BatchAnswer, SearchAnswer, SearchForm, SearchPart, SearchRequest

router = APIRouter(tags=["search"])

Fetch = Callable[[str], Awaitable[bytes]]

_EXAMPLES = {
    "by a picture of the index": {"id": 0, "k": 5},
    "by any picture": {"image": EXAMPLE_PICTURE, "k": 5, "exact": True},
    "by a region of any picture": {"image": EXAMPLE_PICTURE, "roi": [2, 2, 14, 12.5], "k": 5},
    "by a vector": {"vector": [0.6, -0.8], "k": 5},
    "by several pictures": {"parts": [{"image": EXAMPLE_PICTURE}, {"id": 0, "weight": 0.5}], "k": 5},
    "like one, unlike another": {"parts": [{"id": 0}, {"id": 1, "weight": -0.5}], "k": 5},
    "among some of the pictures": {"id": 0, "filter": {"not": {"column": "key", "in": ["a", "b"]}}},
    "re-ranked": {"id": 0, "k": 5, "recall": 0.99, "rerank": "alpha_query_expansion"},
    "with vectors, without metadata": {"id": 0, "k": 5, "include": ["vector"]},
    "of a version of the index": {"id": 0, "k": 5, "version": "v0001"},
}
_BATCH_EXAMPLE = {"searches": [{"id": 0, "k": 5}, {"image": EXAMPLE_PICTURE, "include": []}]}
_FIELDS = SearchRequest.model_json_schema()["properties"] | SearchForm.model_json_schema()["properties"]
_SEARCH_PROBLEMS = (
    "request.malformed",
    "item.unknown",
    "body.too_slow",
    "body.too_large",
    "image.too_many_pixels",
    "url.too_large",
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
    "url.off",
    "url.not_allowed",
    "url.unreachable",
    "url.too_slow",
    "vector.wrong_dim",
    "vector.not_finite",
    "vector.no_direction",
    "vector.cancelled_out",
    "filter.invalid",
    "encoder.unavailable",
    "version.unknown",
    "version.refused",
    "version.off",
    "index.busy",
    "server.overloaded",
)


def _examples(named: dict[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in named.items()}


def _json_body(schema: str, examples: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{schema}"}, "examples": _examples(examples)}


_SEARCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": _json_body("SearchRequest", _EXAMPLES),
            "multipart/form-data": {"schema": {"$ref": "#/components/schemas/SearchForm"}},
            "application/octet-stream": {
                "schema": {"type": "string", "description": "A vector: little-endian float32 values."}
            },
        },
    },
    "parameters": [
        {
            "name": name,
            "in": "query",
            "description": f"Beside a vector in application/octet-stream only. {_FIELDS[name]['description']}",
            "schema": {key: value for key, value in _FIELDS[name].items() if key not in ("description", "title")},
        }
        for name in ADDRESS_FIELDS
    ],
}
_BATCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": _json_body("BatchRequest", {"two searches": _BATCH_EXAMPLE})},
    }
}


@router.post(
    "/search",
    openapi_extra=_SEARCH_BODY,
    responses={200: {"model": SearchAnswer, "description": "What was found"}, **problems(*_SEARCH_PROBLEMS)},
)
async def search(request: Request, engine: Engine, limits: Limits) -> Response:
    """The nearest pictures to a picture or a region of it, a picture of the index, a vector, or several of these."""
    asked = await read_search(request, limits)
    answer = await engine.search(await _query_of(asked, _fetcher(request)))
    return json_answer(search_answer(answer, request, asked.include))


@router.post(
    "/search:batch",
    openapi_extra=_BATCH_BODY,
    responses={
        200: {"model": BatchAnswer, "description": "What each search found, or why it was refused"},
        **problems(
            "request.malformed",
            "body.too_slow",
            "body.too_large",
            "body.unsupported_type",
            "request.invalid",
            "server.overloaded",
        ),
    },
)
async def search_batch(request: Request, engine: Engine, limits: Limits) -> Response:
    """Several searches at once; one that is refused leaves the others alone."""
    asked = await read_batch(request, limits, dim=await engine.greatest_dim())
    charge(request, len(asked))
    fetch = _fetcher(request)
    queries = await asyncio.gather(*[_query_or_problem(search, fetch) for search in asked])
    found = iter(await engine.search_all([query for query in queries if isinstance(query, SearchQuery)]))
    outcomes = [query if isinstance(query, Problem) else next(found) for query in queries]
    _require_any_let_in(outcomes)
    results = [_result(search, outcome, request) for search, outcome in zip(asked, outcomes, strict=True)]
    return json_answer({"request_id": request.state.request_id, "results": results})


def filter_of(tree: Any) -> Filter:
    """Raises Problem where it is none."""
    try:
        return parse_filter(tree)
    except ValueError as error:
        raise Problem("filter.invalid", str(error)) from error


def _fetcher(request: Request) -> Fetch:
    return partial(request.app.state.fetcher.fetch, hold=request.state.hold_bytes)


async def _query_of(asked: SearchRequest, fetch: Fetch) -> SearchQuery:
    """Raises Problem where the filter is none, or a picture cannot be fetched."""
    condition = None if asked.filter is None else filter_of(asked.filter)
    parts: Sequence[SearchRequest | SearchPart] = [asked] if asked.parts is None else asked.parts
    return SearchQuery(
        tuple([await _part_of(part, fetch) for part in parts]),
        SearchParameters(k=asked.k, exact=asked.exact, recall=asked.recall, filter=condition),
        rerank=asked.rerank,
        includes_query=asked.include_self,
        includes_vectors="vector" in asked.include,
        version=asked.version,
    )


async def _part_of(part: SearchRequest | SearchPart, fetch: Fetch) -> QueryPart:
    picture = part.image if part.url is None else await fetch(part.url)
    weight = part.weight if isinstance(part, SearchPart) else 1.0
    return QueryPart(picture=picture, id=part.id, vector=part.vector, roi=part.roi, weight=weight)


async def _query_or_problem(asked: SearchRequest | Problem, fetch: Fetch) -> SearchQuery | Problem:
    if isinstance(asked, Problem):
        return asked
    try:
        return await _query_of(asked, fetch)
    except Problem as problem:
        return problem


def _result(
    asked: SearchRequest | Problem, outcome: Answer | LookalikeError | Problem, request: Request
) -> dict[str, Any]:
    if isinstance(outcome, Answer):
        assert isinstance(asked, SearchRequest)
        return {"answer": search_answer(outcome, request, asked.include)}
    return {"problem": problem_details(problem_of(outcome), request_id=request.state.request_id)}


def _require_any_let_in(outcomes: Sequence[Answer | LookalikeError | Problem]) -> None:
    """Where there was no room for anything, the client is told to wait as after a single search."""
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    if len(refused) == len(outcomes):
        raise max(refused, key=lambda error: error.retry_after_seconds)
