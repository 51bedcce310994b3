"""What a running server answers, as its typed client gives it back. Imports no torch."""

import base64
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float32
from numpy import ndarray
from pydantic import PlainValidator

from lookalike.records import Effort


def _read_vector(text: Any) -> Float32[ndarray, "dim"] | None:
    """Raises ValueError where it is none."""
    if text is None or isinstance(text, ndarray):
        return text
    if not isinstance(text, str):
        raise ValueError("expected float32 values in base64")
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """What the index finds at one effort, measured when it was built."""

    effort: Effort
    recall: float  # share of the exact nearest that are found


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of one request, and of what waits in one process of the server: beyond, requests are refused at once."""

    max_body_bytes: int
    max_body_seconds: float  # until a body has come in
    max_pixels: int  # of a picture, width times height
    max_side: int  # of a picture, the longer one, in pixels
    min_side: int  # the shorter one
    formats: tuple[str, ...]  # of pictures that are opened, such as "JPEG"
    max_k: int
    max_shortlist: int
    max_items: int
    max_queries: int  # of a batch
    max_parts: int  # of a query
    max_compared_versions: int  # open beside the one that serves; 0: searches may name no other
    max_batch: int  # queries that the server works on together
    max_waiting_pictures: int
    max_waiting_searches: int
    max_waiting_reads: int  # lists, items, files of pictures
    max_waiting_writes: int  # additions, replacements, deletions
    max_wait_seconds: float  # that a search may be expected to take


@dataclass(frozen=True, slots=True)
class ServerRateLimit:
    """How much one client may ask of each process of the server."""

    requests_per_second: float
    burst: int  # at once, after it was silent


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What is served, by what."""

    index_version: str
    index_fingerprint: str
    index_type: str
    encoder_fingerprint: str | None  # None where the index was made of vectors, without their encoder
    transform_fingerprint: str | None  # how pictures were prepared for it
    takes_pictures: bool  # else only vectors and ids are searched with
    takes_urls: bool  # whether a search may name pictures by address
    num_vectors: int
    dim: int
    default_effort: Effort
    target_recall: float
    recall_curve: tuple[RecallPoint, ...]
    metadata_columns: tuple[str, ...]  # what filters may name
    rerank_methods: tuple[str, ...]
    has_pictures: bool
    limits: ServerLimits
    rate_limit: ServerRateLimit | None  # None where this client is not counted
    scopes: tuple[Literal["read", "write"], ...]  # what this client may do
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of the gallery; None is what its metadata do not tell."""

    id: int
    key: str | None
    class_name: str | None
    width: int | None  # in pixels
    height: int | None  # in pixels
    metadata: dict[str, Any]  # all other columns
    image_url: str | None  # without scheme and host; None where the server has no pictures


@dataclass(frozen=True, slots=True)
class ItemPage:
    """Some pictures of the gallery."""

    items: tuple[Item, ...]
    next_after_id: int | None = None  # where the next page starts; None on the last one


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture of the gallery that a query found; only id and score come where nothing else was asked for."""

    id: int
    score: float  # cosine similarity to the query; after re-ranking the method's own
    key: str | None = None
    class_name: str | None = None
    width: int | None = None  # in pixels
    height: int | None = None  # in pixels
    metadata: dict[str, Any] = field(default_factory=dict)  # all other columns
    image_url: str | None = None  # without scheme and host; None where the server has no picture
    vector: Annotated[Float32[ndarray, "dim"] | None, PlainValidator(_read_vector)] = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """What a query found, best first; equal scores are ordered by id."""

    request_id: str
    index_version: str
    encoder_fingerprint: str | None
    hits: tuple[Hit, ...]
    # stage -> milliseconds; `queue` is the waiting, `total` is everything
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IndexVersion:
    """One published version."""

    version: str
    is_current: bool
    index_type: str
    num_vectors: int
    dim: int
    encoder_fingerprint: str | None
    num_changes_since: int  # that it does not hold


@dataclass(frozen=True, slots=True)
class IndexVersions:
    """All versions, oldest first."""

    current: str  # that searches are to use
    served: str  # that they do use
    versions: tuple[IndexVersion, ...]
    num_changes: int  # since the current one was made
