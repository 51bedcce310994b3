"""Search with a FAISS index for candidates and the store of vectors for exact scores."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.index_types import IndexType
from indexing.searching.blas_threshold import set_blas_threshold
from indexing.searching.exact import ExactSearcher
from indexing.searching.recall_curve import MeasuredDepth, measured_for
from indexing.searching.survivors import PartitionMap, Survivors, exact_is_cheaper, rows_compared
from indexing.vector_store import VectorStore
from lookalike.exact_search import exact_scores, merge_hits, require_searchable
from lookalike.native_libraries import load_faiss
from lookalike.records import Effort, SearchHits, SearchParameters

# Scores of FAISS are rounded differently from exact ones: a few more candidates settle near-ties at the k-th place.
EXTRA_CANDIDATES = 16
# Of recent selections; each takes some two bytes per vector, and a sample.
_MOST_KEPT_SURVIVORS, _BYTES_OF_KEPT_SURVIVORS = 16, 256 << 20
# Of a graph, in which a search passes through vectors that it may not return.
_MORE_BREADTH = 4
# A larger share of the vectors is searched as if it were all.
_NEARLY_ALL = 0.9
_BYTES_OF_GATHERED_ROWS = 16 << 20
# Queries times partitions that are put in order at once, at some 60 bytes each.
_MOST_PLACES = 1 << 21


class FaissSearcher:
    """A Searcher whose candidates come from FAISS; every score is exact, and equal scores are ordered by id.

    Parameters travel with each call: the FAISS index is never changed. Where more than 16 vectors tie with the last
    candidate, FAISS decides which of them are looked at, unless the search is exact.
    """

    def __init__(
        self, index: Any | None, index_type: IndexType, store: VectorStore, measured: Sequence[MeasuredDepth]
    ) -> None:
        """
        Args:
            index: FAISS index whose labels are the store's ids; None for `Flat`, which is the store alone.
            measured: Of this index, ascending in depth; where a curve has no points, a wish for recall means exact
                search.
        """
        self.exact = ExactSearcher(store)
        self.index_type = index_type
        self.measured = tuple(measured)
        self._index, self._store = index, store
        # Of a function, not of a method: who holds itself stays in memory, with the whole index, after a swap.
        num_kept = max(1, min(_MOST_KEPT_SURVIVORS, _BYTES_OF_KEPT_SURVIVORS // (2 * max(store.num_vectors, 1))))
        self._survivors_of = lru_cache(num_kept)(partial(Survivors.of, store=store))
        if index is not None:
            self._faiss = load_faiss()
            set_blas_threshold()
            self._partitions = PartitionMap(index, store) if index_type.family == "ivf" else None

    @property
    def index(self) -> Any | None:
        """The FAISS index; read-only."""
        return self._index

    @property
    def num_vectors(self) -> int:
        return self._store.num_vectors

    @property
    def dim(self) -> int:
        return self._store.dim

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher.search`; a filter raises ValueError, because there is no metadata here."""
        require_searchable(queries, dim=self.dim, k=parameters.k)
        effort = self.effort_of(parameters)
        if effort is None or parameters.filter is not None or not len(queries) or not self.num_vectors:
            return self.exact.search(queries, parameters)
        queries = np.ascontiguousarray(queries, np.float32)
        if parameters.among is None:
            return self._rescored(queries, self._candidates(queries, effort, k=parameters.k), k=parameters.k)
        survivors = self._survivors_of(parameters.among)
        step = max(1, _MOST_PLACES // self.index_type.num_partitions)
        parts = [
            self._search_among(queries[start : start + step], effort, survivors, parameters)
            for start in range(0, len(queries), step)
        ]
        return SearchHits(np.concatenate([part.ids for part in parts]), np.concatenate([part.scores for part in parts]))

    def effort_of(self, parameters: SearchParameters) -> Effort | None:
        """What `parameters` come to on this index; None for exact search."""
        if parameters.exact or self._index is None:
            return None
        if parameters.effort is not None:
            return parameters.effort
        if parameters.recall is not None:
            return measured_for(parameters.k, self.measured).curve.effort_for(parameters.recall)
        return measured_for(parameters.k, self.measured).default_effort

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """See `Searcher.vectors_of`."""
        return self._store.vectors_of(ids)

    def ids(self) -> Int64[ndarray, "vectors"]:
        """See `Searcher.ids`."""
        return self.exact.ids()

    def _search_among(
        self,
        queries: Float32[ndarray, "queries dim"],
        effort: Effort,
        survivors: Survivors,
        parameters: SearchParameters,
    ) -> SearchHits:
        """Exactly where few survive; otherwise as hard as it takes to see as many survivors as without a filter."""
        k, widened = parameters.k, self._widened(effort, survivors)
        if survivors.count <= k or self._prefers_exact(queries, survivors, self._rows_compared(widened, k)):
            return self.exact.search(queries, parameters)
        if survivors.count >= _NEARLY_ALL * self.num_vectors:
            # Deletions: a few vectors are passed over, and nothing else is different.
            found = self._candidates(queries, widened, k=k, selector=survivors.selector)
            return self._rescored(queries, found, k=k)
        if effort.candidates_per_hit > 1:
            # What survives lies further off and closer together, where codes tell less.
            widened = replace(widened, candidates_per_hit=2 * effort.candidates_per_hit)
        if self._partitions is not None:
            probes = self._partitions.probes(queries, survivors, num_probes=effort.num_probes or 1, k=k)
            if self._prefers_exact(queries, survivors, probes.rows_per_query):
                return self.exact.search(queries, parameters)
            found = self._partitions.search(queries, probes, survivors, depth=self._depth(widened, k))
        else:
            widened = replace(widened, breadth=_MORE_BREADTH * self._breadth(widened, k))
            found = self._candidates(queries, widened, k=k, selector=survivors.selector)
        hits = self._rescored(queries, found, k=k)
        doubtful = np.flatnonzero(survivors.are_missed(queries, hits))
        if len(doubtful):
            again = self.exact.search(queries[doubtful], parameters)
            hits.ids[doubtful], hits.scores[doubtful] = again.ids, again.scores
        return hits

    def _prefers_exact(
        self, queries: Float32[ndarray, "queries dim"], survivors: Survivors, rows_per_query: float
    ) -> bool:
        return exact_is_cheaper(self._store, survivors.count, num_queries=len(queries), rows_per_query=rows_per_query)

    def _rows_compared(self, effort: Effort, k: int) -> float:
        return rows_compared(self.index_type, replace(effort, breadth=self._breadth(effort, k)), self.num_vectors)

    def _candidates(
        self, queries: Float32[ndarray, "queries dim"], effort: Effort, *, k: int, selector: Any | None = None
    ) -> Int64[ndarray, "queries depth"]:
        if self.index_type.family == "ivf":
            num_probes = min(effort.num_probes or 1, self.index_type.num_partitions)
            parameters = self._faiss.SearchParametersIVF(nprobe=num_probes, sel=selector)
        else:
            parameters = self._faiss.SearchParametersHNSW(efSearch=self._breadth(effort, k), sel=selector)
        assert self._index is not None
        _, ids = self._index.search(queries, self._depth(effort, k), params=parameters)
        return ids

    def _widened(self, effort: Effort, survivors: Survivors) -> Effort:
        """As much more effort as there are vectors for each survivor."""

        def wider(value: int | None) -> int | None:
            return None if value is None else -(-value * self.num_vectors // max(survivors.count, 1))

        return replace(effort, num_probes=wider(effort.num_probes), breadth=wider(effort.breadth))

    def _depth(self, effort: Effort, k: int) -> int:
        return min(k * effort.candidates_per_hit + EXTRA_CANDIDATES, self.num_vectors)

    def _breadth(self, effort: Effort, k: int) -> int:
        return max(effort.breadth or 1, self._depth(effort, k))

    def _rescored(
        self, queries: Float32[ndarray, "queries dim"], ids: Int64[ndarray, "queries depth"], *, k: int
    ) -> SearchHits:
        scores = np.full(ids.shape, -np.inf, np.float32)
        query_rows, places = np.nonzero(ids >= 0)
        rows = self._store.rows_of(ids[query_rows, places])
        step = max(1, _BYTES_OF_GATHERED_ROWS // (4 * self.dim))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            vectors = np.asarray(self._store.vectors[rows[part]], np.float32)
            scores[query_rows[part], places[part]] = exact_scores(queries[query_rows[part]], vectors)
        return merge_hits([SearchHits(ids=ids, scores=scores)], k=k)
