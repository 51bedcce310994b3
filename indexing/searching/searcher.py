"""What every way to search offers, whatever lies behind it: arrays, FAISS, several parts, a live index, a database."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float32, Int64
from numpy import ndarray

from lookalike.records import SearchHits, SearchParameters


@runtime_checkable
class Searcher(Protocol):
    """May be used from many threads at once: no search changes what another one sees."""

    @property
    def num_vectors(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """The k best of each query; equal scores are ordered by id; where there are fewer, ids end in -1.

        Raises:
            ValueError: wrong dimension, a query that is not finite, or a filter where there is no metadata.
        """
        ...

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """The stored vectors of `ids`.

        Raises:
            KeyError: an id is not here.
        """
        ...

    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids, ascending."""
        ...
