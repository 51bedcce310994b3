"""Searches and what they find."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, WrapValidator, model_validator

from serving.schemas.fields import (
    AnswerModel,
    FileInForm,
    ItemId,
    PictureBytes,
    Region,
    RequestModel,
    RerankMethod,
    VectorNumbers,
    VersionName,
)
from serving.schemas.problems import ProblemDetails
from serving.settings import MOST_HITS, MOST_PARTS, MOST_QUERIES

Extra = Literal["metadata", "vector", "timings"]
_KINDS_OF_QUERY = ("image", "url", "id", "vector")
_LARGEST_WEIGHT = 1_000.0


class _OneQuery(RequestModel):
    """What is searched by, as far as it is one thing."""

    image: PictureBytes | None = None
    """A picture file, in base64."""
    url: Annotated[str, Field(min_length=1, max_length=2_048)] | None = None
    """Where a picture is, on a host that this server fetches from; most servers fetch nothing."""
    id: ItemId | None = None
    """A picture that is in the index."""
    vector: VectorNumbers | None = None
    """An embedding made by the index's encoder, as numbers or as little-endian float32 in base64; scaled to unit
    length."""
    roi: Region | None = None
    """With `image` or `url`: the region to search by; left, top, right, bottom in pixels of the upright picture."""

    def given_kinds(self) -> list[str]:
        return [name for name in _KINDS_OF_QUERY if getattr(self, name) is not None]

    def require_fitting_region(self) -> None:
        if self.roi is not None and self.image is None and self.url is None:
            raise ValueError("roi has a meaning only with image or url")


class SearchPart(_OneQuery):
    """One of several things that are searched by together: exactly one of `image`, `url`, `id` and `vector`."""

    weight: Annotated[float, Field(ge=-_LARGEST_WEIGHT, le=_LARGEST_WEIGHT)] = 1.0
    """Its share of the query, beside those of the other parts; below 0 an example of what is not wanted."""

    @model_validator(mode="after")
    def _is_one(self) -> "SearchPart":
        given = self.given_kinds()
        if len(given) != 1:
            raise ValueError(f"give exactly one of image, url, id and vector; found {' and '.join(given) or 'none'}")
        self.require_fitting_region()
        if self.weight == 0:
            raise ValueError("a weight of 0 has no effect: leave the part out")
        return self


class SearchRequest(_OneQuery):
    """Exactly one of `image`, `url`, `id`, `vector` and `parts`, and how to search with it."""

    parts: Annotated[list[SearchPart], Field(min_length=1, max_length=MOST_PARTS)] | None = None
    """Several of them: searched by is their weighted sum, each scaled to unit length before. A server's own limit is
    `limits.max_parts` of /v1/info."""
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 10
    """Number of hits; the server's own limit may be lower, see `limits.max_k` of /v1/info."""
    exact: bool = False
    """Compare with every vector, whatever the index."""
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    """Search as hard as finds this share of the exact nearest, by the index's measured curve."""
    filter: dict[str, Any] | None = None
    """Find only pictures whose metadata fit: {"column": "class_name", "in": ["cat", "dog"]}; in place of `in` also
    equals, at_least, at_most, above, below; around such conditions {"all": [...]}, {"any": [...]}, {"not": ...}."""
    rerank: RerankMethod | None = None
    """A second look at the first hits: a method's name, or its settings. Scores become the method's own."""
    include_self: bool = False
    """With `id`, also in `parts`: let these pictures find themselves."""
    include: list[Extra] = Field(default=["metadata", "timings"], max_length=3)
    """What the answer tells beside ids and scores: `metadata` (all about a picture), `vector`, `timings`."""
    version: VersionName | None = None
    """The version to search, as in GET /v1/indexes; null: the one that serves. Another one is opened beside it, and the
    first search waits for that; nothing is changed over."""

    @model_validator(mode="after")
    def _has_one_query(self) -> "SearchRequest":
        given = self.given_kinds() + (["parts"] if self.parts is not None else [])
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of image, url, id, vector and parts; found {' and '.join(given) or 'none'}"
            )
        if self.include_self and self.id is None and not any(part.id is not None for part in self.parts or ()):
            raise ValueError("include_self has a meaning only with id")
        self.require_fitting_region()
        if self.exact and self.recall is not None:
            raise ValueError("recall has no meaning with exact, which finds all")
        return self


class SearchForm(RequestModel):
    """Picture files as browsers and `curl -F` send them. Files other than `image` have the names that `parts` uses."""

    model_config = ConfigDict(
        json_schema_extra={"additionalProperties": {"type": "string", "contentMediaType": "application/octet-stream"}}
    )

    image: FileInForm | None = None
    """A picture file; where there are several, give `parts`."""
    parts: Annotated[str, Field(examples=['[{"image": "front"}, {"image": "back", "weight": 0.5}]'])] | None = None
    """As in a search in JSON, and written in JSON; but `image` names a file of this form."""
    roi: Annotated[str, Field(examples=["16,8,80,64.5"])] | None = None
    """The region to search by: left,top,right,bottom in pixels of the upright picture, rounded; also in brackets."""
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 10
    """Number of hits; the server's own limit may be lower, see `limits.max_k` of /v1/info."""
    exact: bool = False
    """Compare with every vector, whatever the index."""
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    """Search as hard as finds this share of the exact nearest, by the index's measured curve."""
    filter: Annotated[str, Field(examples=['{"column": "class_name", "in": ["disc", "ring"]}'])] | None = None
    """Find only pictures whose metadata fit this condition, in JSON."""
    rerank: Annotated[str, Field(examples=["alpha_query_expansion"])] | None = None
    """A second look at the first hits: a method's name, or its settings in JSON."""
    include_self: bool = False
    """With `id` in `parts`: let these pictures find themselves."""
    include: Annotated[str, Field(examples=["metadata,timings"])] | None = None
    """What the answer tells beside ids and scores: some of metadata,vector,timings; nothing where it is empty."""
    version: VersionName | None = None
    """The version to search, as in GET /v1/indexes; null: the one that serves. Another one is opened beside it, and the
    first search waits for that; nothing is changed over."""


def _kept_as_error(value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        return error


SearchOrError = Annotated[SearchRequest, WrapValidator(_kept_as_error)]


class BatchRequest(RequestModel):
    """Several searches in one request."""

    searches: Annotated[list[SearchOrError], Field(min_length=1, max_length=MOST_QUERIES)]
    """Each as in POST /v1/search; the server's own limit is `limits.max_queries` of /v1/info."""


class HitAnswer(AnswerModel):
    """A picture of the gallery that a query found; all but `id` and `score` come where they were asked for."""

    id: int
    """The same as long as the picture is in the index."""
    score: float
    """Cosine similarity to the query, from -1 to 1 but for rounding: 1.0000001, or 1.0002 where the index keeps vectors
    in half precision. After `rerank` the method's own score."""
    key: str | None = None
    """Its name in the shards; null where the index was made of vectors without one."""
    class_name: str | None = None
    """What it shows, where that is known."""
    width: int | None = None
    """In pixels, where that is known."""
    height: int | None = None
    """In pixels, where that is known."""
    metadata: dict[str, Any] | None = None
    """All other columns of the index's metadata."""
    image_url: str | None = None
    """Where the original is; null where this server does not have it."""
    vector: str | None = None
    """Its embedding: little-endian float32 in base64."""


class SearchAnswer(AnswerModel):
    """What a query found, best first; equal scores are ordered by id."""

    request_id: str
    """Also in the X-Request-ID header and in the server's log."""
    index_version: str
    """The version that was searched."""
    encoder_fingerprint: str | None
    """The encoder that made query and gallery vectors; null where that is not known."""
    timings_ms: dict[str, float] | None = None
    """Milliseconds of work per stage; `queue` is the waiting between them, `total` is everything."""
    hits: list[HitAnswer]
    """At most k; fewer where the gallery is smaller."""


class BatchResult(AnswerModel):
    """What became of one search of a batch: `answer` or `problem`."""

    answer: SearchAnswer | None = None
    """What it found."""
    problem: ProblemDetails | None = None
    """Why it was refused."""


class BatchAnswer(AnswerModel):
    """The results of a batch, in the order of its searches."""

    request_id: str
    """Also in the X-Request-ID header and in the server's log."""
    results: list[BatchResult]
    """One for each search."""
