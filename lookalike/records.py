"""Values that cross folder borders."""

from dataclasses import dataclass

from jaxtyping import Float32, Int64
from numpy import ndarray

from lookalike.filters import Filter
from lookalike.id_selection import IdSelection


@dataclass(frozen=True, slots=True)
class SearchHits:
    """The k best gallery images of each query, best first; ties are ordered by id."""

    ids: Int64[ndarray, "queries k"]  # -1 where the gallery holds fewer than k images
    scores: Float32[ndarray, "queries k"]  # cosine similarity, descending; -inf where the id is -1


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard an approximate index looks; a part that an index type does not have is None."""

    num_probes: int | None = None  # partitions visited by an IVF index
    breadth: int | None = None  # candidates that an HNSW index keeps (efSearch)
    candidates_per_hit: int = 1  # for each of the k, so many are taken from the compressed vectors and scored exactly

    def __post_init__(self) -> None:
        for name in ("num_probes", "breadth", "candidates_per_hit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class SearchParameters:
    """How to search; travels with the query and never changes a shared index.

    Of `exact`, `effort` and `recall` the first that is given decides; without any, the index takes what reaches the
    recall it was built for.
    """

    k: int = 10
    exact: bool = False  # scan every vector, whatever the index
    effort: Effort | None = None  # look as hard as this
    # Find this share of the exact k nearest, by curves that the index was measured with for lists of 10 (or as many as
    # was chosen) and of 100; for k in between by the longer one's. Lists longer than all of them may find less.
    recall: float | None = None
    filter: Filter | None = None  # find only pictures whose metadata fit
    among: IdSelection | None = None  # find only these ids

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise ValueError(f"recall must be above 0 and at most 1, got {self.recall}")
