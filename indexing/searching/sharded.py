"""Several parts with disjoint ids, searched as one."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.searching.searcher import Searcher
from lookalike.exact_search import merge_hits, require_searchable
from lookalike.records import SearchHits, SearchParameters


class ShardedSearcher:
    """A Searcher over parts; where they search exactly, so does the whole: equal scores are ordered by id."""

    def __init__(self, parts: Sequence[Searcher]) -> None:
        """Raises ValueError for no parts, parts of different dimension, or an id that two parts hold."""
        if not parts or len({part.dim for part in parts}) > 1:
            raise ValueError(f"parts must be of one dimension, found {[part.dim for part in parts]}")
        self._parts = tuple(parts)
        self._ids = [part.ids() for part in parts]
        together = np.sort(np.concatenate(self._ids))
        repeated = together[1:][together[1:] == together[:-1]]
        if len(repeated):
            raise ValueError(f"id {int(repeated[0])} is in two parts; {len(repeated)} ids are")

    @property
    def num_vectors(self) -> int:
        return sum(part.num_vectors for part in self._parts)

    @property
    def dim(self) -> int:
        return self._parts[0].dim

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher.search`."""
        require_searchable(queries, dim=self.dim, k=parameters.k)
        return merge_hits([part.search(queries, parameters) for part in self._parts], k=parameters.k)

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """See `Searcher.vectors_of`."""
        vectors = np.empty((len(ids), self.dim), np.float32)
        is_found = np.zeros(len(ids), bool)
        for part, its_ids in zip(self._parts, self._ids, strict=True):
            is_here = np.isin(ids, its_ids)
            vectors[is_here] = part.vectors_of(ids[is_here])
            is_found |= is_here
        if not is_found.all():
            raise KeyError(int(ids[~is_found][0]))
        return vectors

    def ids(self) -> Int64[ndarray, "vectors"]:
        """See `Searcher.ids`."""
        return np.sort(np.concatenate(self._ids))
