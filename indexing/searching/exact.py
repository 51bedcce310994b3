"""Exact search over a store of any size, which may be memory-mapped: every vector is compared, block by block."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from indexing.searching.screening import (
    NormBounds,
    Product,
    Screening,
    fastest_product,
    measure_norms,
)
from indexing.vector_store import VectorStore
from lookalike.exact_search import CandidatePool, block_bounds, require_searchable
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import uses_torch
from lookalike.records import SearchHits, SearchParameters

Precision = Literal["auto", "float32", "bfloat16"]

_MOST_QUERIES_AT_ONCE = 2048
# Rows that are picked one by one cost about this many rows that are read in a row.
COST_OF_A_GATHERED_ROW = 6


class ExactSearcher:
    """A Searcher that compares queries with every vector; effort and recall have no bearing on it.

    Scores are those of `lookalike.exact_search.exact_scores`, whatever the precision of the products that screen;
    `auto` takes the fastest way on this machine for each batch size.
    """

    def __init__(self, store: VectorStore, *, precision: Precision = "auto") -> None:
        self._store = store
        self._precision = precision

    @property
    def num_vectors(self) -> int:
        return self._store.num_vectors

    @property
    def dim(self) -> int:
        return self._store.dim

    @cached_property
    def norms(self) -> NormBounds:
        """Measured in one pass at the first search."""
        return measure_norms(self._store.vectors)

    @cached_property
    def _device_gallery(self) -> Any | None:
        """A `DeviceGallery`, filled at the first search, where this process has a GPU and precision is left to us."""
        if self._precision != "auto" or not uses_torch():
            return None
        from indexing.searching.device_gallery import DeviceGallery

        return DeviceGallery.of(self._store.vectors, self.norms)

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher.search`; a filter raises ValueError, because there is no metadata here."""
        require_searchable(queries, dim=self.dim, k=parameters.k)
        if parameters.filter is not None:
            raise ValueError("a filter needs metadata, and here are vectors only")
        queries = np.ascontiguousarray(queries, np.float32)
        chunks = [
            self._search_chunk(queries[start : start + _MOST_QUERIES_AT_ONCE], parameters)
            for start in range(0, max(len(queries), 1), _MOST_QUERIES_AT_ONCE)
        ]
        if len(chunks) == 1:
            return chunks[0]
        return SearchHits(
            ids=np.concatenate([chunk.ids for chunk in chunks]),
            scores=np.concatenate([chunk.scores for chunk in chunks]),
        )

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """See `Searcher.vectors_of`."""
        return self._store.vectors_of(ids)

    def ids(self) -> Int64[ndarray, "vectors"]:
        """See `Searcher.ids`."""
        return np.asarray(self._store.ids)

    def _search_chunk(self, queries: Float32[ndarray, "queries dim"], parameters: SearchParameters) -> SearchHits:
        if parameters.among is None and self._device_gallery is not None:
            from indexing.searching.device_gallery import can_be_halved

            if can_be_halved(queries):
                return self._search_on_device(queries, self._device_gallery, k=parameters.k)
        screening = Screening(queries, self.norms, product=self._product_for(len(queries)))
        pool = CandidatePool(
            queries,
            self._store.vectors,
            self._store.ids,
            k=parameters.k,
            absolute_error=screening.absolute_error,
            relative_error=screening.relative_error,
        )
        for rows, block, is_excluded in self._blocks(parameters.among, num_queries=len(queries)):
            scores = screening.scores(block)
            if is_excluded is not None:
                scores[:, is_excluded] = -np.inf
            pool.add(scores, rows)
        return pool.hits()

    def _search_on_device(self, queries: Float32[ndarray, "queries dim"], gallery: Any, *, k: int) -> SearchHits:
        error = gallery.absolute_error(queries, self.norms)
        pool = CandidatePool(queries, self._store.vectors, self._store.ids, k=k, absolute_error=error)
        gallery.screen(queries, pool)
        return pool.hits()

    def _product_for(self, num_queries: int) -> Product:
        if self._precision == "auto":
            return fastest_product(num_queries, self.dim)
        if self._precision == "bfloat16":
            return "bfloat16"
        return fastest_product(num_queries, self.dim, among=("vector", "float32"))

    def _blocks(
        self, among: IdSelection | None, *, num_queries: int
    ) -> Iterator[tuple[Int64[ndarray, "rows"], ndarray, Bool[ndarray, "rows"] | None]]:
        """Rows of the store, their vectors, and which of them must not be found."""
        if among is None:
            for start, stop in block_bounds(self.num_vectors, num_queries=num_queries):
                yield np.arange(start, stop), self._store.vectors[start:stop], None
            return
        may_be_found = selected_rows(self._store, among)
        if COST_OF_A_GATHERED_ROW * np.count_nonzero(may_be_found) <= self.num_vectors:
            rows = np.flatnonzero(may_be_found)
            for start, stop in block_bounds(len(rows), num_queries=num_queries):
                yield rows[start:stop], self._store.vectors[rows[start:stop]], None
        else:
            for start, stop in block_bounds(self.num_vectors, num_queries=num_queries):
                yield np.arange(start, stop), self._store.vectors[start:stop], ~may_be_found[start:stop]


def selected_rows(store: VectorStore, among: IdSelection) -> Bool[ndarray, "vectors"]:
    """For each row of the store whether its id is selected; ids that the store does not hold are passed over."""
    is_listed = np.zeros(store.num_vectors, bool)
    if store.num_vectors and len(among.ids):
        rows = np.minimum(np.searchsorted(store.ids, among.ids), store.num_vectors - 1)
        is_listed[rows[store.ids[rows] == among.ids]] = True
    return is_listed != among.excludes
