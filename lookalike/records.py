"""Values that cross folder borders."""

from dataclasses import dataclass

from jaxtyping import Float32, Int64
from numpy import ndarray


@dataclass(frozen=True, slots=True)
class SearchHits:
    """The k best gallery images of each query, best first; ties are ordered by id."""

    ids: Int64[ndarray, "queries k"]  # -1 where the gallery holds fewer than k images
    scores: Float32[ndarray, "queries k"]  # cosine similarity, descending; -inf where the id is -1


@dataclass(frozen=True, slots=True)
class SearchParameters:
    """How to search; travels with the query and never changes a shared index."""

    k: int = 10
    exact: bool = False  # scan every vector, whatever the index
    num_probes: int | None = None  # partitions visited by an IVF index; None takes the index's own default

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.num_probes is not None and self.num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {self.num_probes}")
