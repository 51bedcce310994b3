"""What the engine is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Float32
from numpy import ndarray

from indexing.reranking.settings import RerankSettings
from lookalike.records import SearchParameters

Vector = Sequence[float] | Float[ndarray, "dim"]
Region = Sequence[int | float]


@dataclass(frozen=True, slots=True, eq=False)
class QueryPart:
    """A picture, an id of the gallery, or a vector: exactly one of them."""

    picture: bytes | None = None
    id: int | None = None
    vector: Vector | None = None  # of any length above 0
    roi: Region | None = None  # of a picture: left, top, right, bottom in pixels of the upright picture
    weight: float = 1.0  # below 0: what the hits should not look like

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.picture, self.id, self.vector)) != 1:
            raise ValueError("a part of a query is exactly one of picture, id and vector")
        if self.roi is not None and self.picture is None:
            raise ValueError("roi is a region of a picture, and there is none")


@dataclass(frozen=True, slots=True, eq=False)
class SearchQuery:
    """Several parts are summed up, each as its weight times its unit vector, and the sum is scaled to unit length."""

    parts: tuple[QueryPart, ...]
    parameters: SearchParameters = field(default_factory=SearchParameters)
    rerank: RerankSettings | None = None
    includes_query: bool = False  # whether ids that are parts may be hits, too
    includes_vectors: bool = False  # whether hits carry their stored vectors
    deadline_seconds: float | None = None  # an answer that would come later is not begun
    version: str | None = None  # of the index; None: the one that serves


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of the gallery; None is what its metadata do not tell."""

    id: int
    key: str | None
    class_name: str | None
    width: int | None  # in pixels
    height: int | None  # in pixels
    metadata: dict[str, Any]  # all other columns
    picture: str | None = None  # differs where the picture behind the id does; None: there is none to show


@dataclass(frozen=True, slots=True, eq=False)
class Hit:
    item: Item
    score: float  # cosine similarity to the query; the method's own where it was re-ranked
    vector: Float32[ndarray, "dim"] | None = None  # where it was asked for


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What one query found, best first, and how."""

    hits: list[Hit]
    index_version: str
    encoder_fingerprint: str | None
    timings_ms: dict[str, float]  # stage -> wall milliseconds of work; `queue` is the waiting, `total` is everything


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture as it is sent."""

    data: bytes
    media_type: str
    tag: str  # differs where the bytes do


@dataclass(frozen=True, slots=True)
class IndexVersion:
    """One version in the index folder."""

    name: str
    is_current: bool  # on the disk
    is_served: bool  # by this worker; another one than the current where that was refused
    index_type: str
    num_vectors: int
    dim: int
    encoder_fingerprint: str | None
    num_changes_since: int  # in the journal, not in this version


@dataclass(frozen=True, slots=True)
class IndexVersions:
    """What the index folder holds."""

    current: str  # on the disk; another one may serve, where that was refused
    served: str
    num_changes: int  # in the journal, not in the version that serves
    versions: list[IndexVersion]  # oldest first
