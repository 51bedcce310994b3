"""What the API takes and gives: every field has a range and a sentence, and the OpenAPI document is made from them."""

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, WithJsonSchema, model_validator

from serving.settings import MOST_HITS

LARGEST_ID = 2**63 - 1
LONGEST_VECTOR = 16_384
EXAMPLE_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAASElEQVR42mP8v8+GgRTAxEAiIFkDC6bQ5ToEW7eJkA3IqjG56BowpTEF"
    "mfCrxpSifShRoAEzBLFKMeGSwCXIhF8a0wjGwZf4AJllEhPp6PbzAAAAAElFTkSuQmCC"
)


def _decode_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not base64: use the standard alphabet, padding, no line breaks, no data: prefix") from error


PictureBytes = Annotated[
    bytes,
    BeforeValidator(_decode_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]
ItemId = Annotated[int, Field(ge=0, le=LARGEST_ID)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class SearchRequest(_Request):
    """Exactly one of `image`, `id` and `vector`, and how to search with it."""

    image: PictureBytes | None = None
    """A picture file, in base64."""
    id: ItemId | None = None
    """A picture that is in the index."""
    vector: Annotated[list[float], Field(min_length=1, max_length=LONGEST_VECTOR)] | None = None
    """An embedding made by the index's encoder; it is scaled to unit length."""
    roi: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)] | None = None
    """With `image`: the region to search by; left, top, right, bottom in pixels of the upright picture, rounded."""
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 10
    """Number of hits; the server's own limit may be lower, see `limits.max_k` of /v1/info."""
    exact: bool = False
    """Compare with every vector, whatever the index."""
    include_self: bool = False
    """With `id`: let the picture find itself."""

    @model_validator(mode="after")
    def _has_one_query(self) -> "SearchRequest":
        given = [name for name in ("image", "id", "vector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of image, id and vector; found {' and '.join(given) or 'none'}")
        if self.include_self and self.id is None:
            raise ValueError("include_self has a meaning only with id")
        if self.roi is not None and self.image is None:
            raise ValueError("roi has a meaning only with image")
        return self


class SearchForm(_Request):
    """A picture file as browsers and `curl -F` send it."""

    image: Annotated[bytes, WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"})]
    """A picture file."""
    roi: Annotated[str, Field(examples=["16,8,80,64.5"])] | None = None
    """The region to search by: left,top,right,bottom in pixels of the upright picture, rounded."""
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 10
    """Number of hits; the server's own limit may be lower, see `limits.max_k` of /v1/info."""
    exact: bool = False
    """Compare with every vector, whatever the index."""


class ItemAnswer(_Answer):
    """One picture of the gallery."""

    id: int
    """The same as long as the shards are."""
    key: str
    """Its name in the shards."""
    class_name: str | None
    """What it shows, where that is known."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    image_url: str | None
    """Where the original is; null where this server has no pictures."""


class HitAnswer(ItemAnswer):
    """A picture of the gallery that a query found."""

    score: float
    """Cosine similarity to the query, from -1 to 1."""


class SearchAnswer(_Answer):
    """What a query found, best first; equal scores are ordered by id."""

    request_id: str
    """Also in the X-Request-ID header and in the server's log."""
    index_version: str
    """The version that was searched."""
    encoder_fingerprint: str
    """The encoder that made query and gallery vectors."""
    timings_ms: dict[str, float]
    """Milliseconds of work per stage; `queue` is the waiting between them, `total` is everything."""
    hits: list[HitAnswer]
    """At most k; fewer where the gallery is smaller."""


class ItemsAnswer(_Answer):
    """Random pictures of the gallery."""

    seed: int
    """Gives the same pictures again."""
    items: list[ItemAnswer]
    """All different."""


class RecallPoint(_Answer):
    """What the index finds at one number of probes, measured when it was built."""

    num_probes: int
    """Partitions visited."""
    recall_at_10: float
    """Share of the exact 10 nearest that are found."""
    milliseconds_per_query: float
    """On the machine that built the index."""


class LimitsAnswer(_Answer):
    """Bounds of one request."""

    max_body_bytes: int
    """Longest request body."""
    max_k: int
    """Most hits of one search."""
    max_items: int
    """Most random items in one answer."""


class InfoAnswer(_Answer):
    """What is served, by what."""

    index_version: str
    """The live version."""
    index_fingerprint: str
    """Identifies the content of the index."""
    index_type: str
    """How it searches."""
    encoder_fingerprint: str
    """The encoder that made the vectors."""
    num_vectors: int
    """Pictures that can be found."""
    dim: int
    """Length of the vectors."""
    default_num_probes: int
    """Partitions that a search visits."""
    recall_curve: list[RecallPoint]
    """Measured on the index's own vectors."""
    has_pictures: bool
    """Whether originals can be shown."""
    limits: LimitsAnswer
    """Bounds of one request."""
    versions: dict[str, str]
    """Of the server, Python and the libraries that compute."""


class HealthAnswer(_Answer):
    """The server is well."""

    status: Literal["ok"] = "ok"
    """Always `ok`; anything else is a problem."""


class FieldError(_Answer):
    """One refused field."""

    field: str
    """Its name."""
    message: str
    """What was wrong with it."""


class ProblemDetails(_Answer):
    """RFC 9457 problem details; the type is about:blank, `code` tells kinds apart."""

    title: str
    """The status in words."""
    status: int
    """The HTTP status."""
    detail: str
    """What was wrong with this request."""
    code: str
    """Stable; branch on it."""
    fix: str
    """What to do next."""
    request_id: str
    """Also in the server's log."""
    errors: list[FieldError] | None = None
    """With `request.invalid`: the refused fields, at most 20 of them."""
