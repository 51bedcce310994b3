"""Exact search by streaming over blocks of the gallery, in bounded memory: the oracle for every index.

The score of a pair is its inner product in float64, rounded to float32. It depends on the two vectors alone: not on the
batch, the block, the order of the gallery, its parts or the number of threads. So every way to search that re-scores
its candidates with `exact_scores` gives the same answer to the last bit, ties included. Matrix products, which are fast
but round differently each time, only screen: they drop what provably cannot be among the k best.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from lookalike.products import product
from lookalike.records import SearchHits

_ROWS_OF_FIRST_BLOCK = 1024
_MOST_ROWS_OF_BLOCK = 4096
_FLOAT32_ROUNDING = 2.0**-24
_LOWEST = np.finfo(np.float32).min
# Products with unit vectors and their sums stay far inside float32.
_LARGEST_QUERY_VALUE = 1e15
_LARGEST_POOL = 1 << 20
_BYTES_OF_GATHERED_ROWS = 8 << 20


def exact_search(
    queries: Float32[ndarray, "queries query_dim"],
    gallery: Float32[ndarray, "gallery dim"],
    ids: Int64[ndarray, "gallery"],
    *,
    k: int,
    excluded_ids: Int64[ndarray, "queries"] | None = None,
) -> SearchHits:
    """The k gallery rows of highest inner product for each query; equal scores are ordered by id.

    Args:
        queries: Rows to search for; unit length gives cosine similarity.
        gallery: Finite; may be memory-mapped. It is read twice, block by block: for its norms, and for the products.
        ids: Of the gallery rows; unique.
        k: At least 1; where the gallery is smaller, ids end in -1.
        excluded_ids: One id per query that must not be found: the query itself in leave-one-out protocols.

    Raises:
        ValueError: shapes do not fit, or a query is not finite.
    """
    require_searchable(queries, dim=gallery.shape[1], k=k)
    error = float32_screening_error(queries, largest_norm=largest_norm(gallery))
    pool = CandidatePool(queries, gallery, ids, k=k, absolute_error=error)
    for start, stop in block_bounds(len(gallery), num_queries=len(queries)):
        scores = product(queries, gallery[start:stop].T)
        if excluded_ids is not None:
            scores[excluded_ids[:, None] == ids[None, start:stop]] = -np.inf
        pool.add(scores, np.arange(start, stop))
    return pool.hits()


def exact_scores(
    queries: Float32[ndarray, "pairs dim"], vectors: Float32[ndarray, "pairs dim"]
) -> Float32[ndarray, "pairs"]:
    """The score of each pair of rows: the definition that all ways to search share."""
    scores: ndarray = np.einsum("nd,nd->n", queries, vectors, dtype=np.float64)
    return scores.astype(np.float32)


def merge_hits(parts: Iterable[SearchHits], *, k: int) -> SearchHits:
    """The k best of several hit lists over disjoint galleries; equal scores are ordered by id."""
    parts = list(parts)
    ids = np.concatenate([part.ids for part in parts], axis=1)
    scores = np.concatenate([part.scores for part in parts], axis=1)
    scores = np.where(ids < 0, np.float32(-np.inf), scores)
    ids = np.where(np.isneginf(scores), np.int64(-1), ids)
    if ids.shape[1] < k:
        padding = ((0, 0), (0, k - ids.shape[1]))
        ids = np.pad(ids, padding, constant_values=-1)
        scores = np.pad(scores, padding, constant_values=-np.inf)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return SearchHits(
        ids=np.take_along_axis(ids, order, axis=1),
        scores=np.take_along_axis(scores, order, axis=1),
    )


def require_searchable(queries: Float32[ndarray, "queries query_dim"], *, dim: int, k: int) -> None:
    """Raises ValueError unless the queries are finite rows of length `dim` and k is at least 1."""
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries have shape {queries.shape}, the gallery holds vectors of length {dim}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not np.isfinite(queries).all():
        raise ValueError("a query holds NaN or infinity")
    if queries.size and np.abs(queries).max() > _LARGEST_QUERY_VALUE:
        raise ValueError(f"a query holds a value above {_LARGEST_QUERY_VALUE:.0e}; vectors of unit length are expected")


def largest_norm(vectors: Float32[ndarray, "gallery dim"]) -> float:
    """Raises ValueError where a vector is not finite."""
    largest = 0.0
    for start in range(0, len(vectors), _ROWS_OF_FIRST_BLOCK):
        block = vectors[start : start + _ROWS_OF_FIRST_BLOCK]
        # A sum of squares in float32 is at most this much too small.
        squared = np.einsum("nd,nd->n", block, block).max() * (1 + 2 * block.shape[1] * _FLOAT32_ROUNDING)
        if not np.isfinite(squared):
            raise ValueError(f"a vector of the gallery, in rows {start} to {start + len(block) - 1}, is not finite")
        largest = max(largest, float(squared))
    return float(np.sqrt(largest))


def float32_screening_error(
    queries: Float32[ndarray, "queries dim"], *, largest_norm: float
) -> Float64[ndarray, "queries"]:
    """How far a float32 product may be from the true one, in whatever order it is summed.

    Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5: dim roundings, by Cauchy-Schwarz
    relative to the product of norms. Four more stand for the rounding of the final score and of this bound.
    """
    rounding = (queries.shape[1] + 4) * _FLOAT32_ROUNDING
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    # The last term stands for numbers so small that a processor may flush them to zero.
    return rounding / (1 - rounding) * norms * largest_norm + queries.shape[1] * 1e-37 * (1 + norms)


def block_bounds(num_rows: int, *, num_queries: int) -> Iterable[tuple[int, int]]:
    """Blocks whose scores stay in the processor's cache: a short one first, that tells what is hopeless."""
    rows = min(_MOST_ROWS_OF_BLOCK, max(_ROWS_OF_FIRST_BLOCK, (1 << 20) // max(num_queries, 1)))
    start = 0
    while start < num_rows:
        stop = min(num_rows, start + (_ROWS_OF_FIRST_BLOCK if start == 0 else rows))
        yield start, stop
        start = stop


class CandidatePool:
    """Gallery rows that may still be among the k best of some query; fed block by block with inexact scores."""

    def __init__(
        self,
        queries: Float32[ndarray, "queries dim"],
        vectors: ndarray,
        ids: Int64[ndarray, "gallery"],
        *,
        k: int,
        absolute_error: Float64[ndarray, "queries"],
        relative_error: float = 0.0,
    ) -> None:
        """An inexact score x stands for a true score within absolute_error + relative_error * |x|.

        Args:
            vectors: Of the whole gallery, [gallery, dim], float32 or float16.
        """
        self._queries, self._vectors, self._ids, self._k = queries, vectors, ids, k
        self._absolute_error, self._relative_error = absolute_error, relative_error
        self.cut = np.full(len(queries), _LOWEST, np.float32)  # inexact scores below it are hopeless
        self._query_rows = np.zeros(0, np.int64)
        self._gallery_rows = np.zeros(0, np.int64)
        self._scores = np.zeros(0, np.float32)
        self._num_sorted = 0

    def add(self, scores: Float32[ndarray, "queries block"], gallery_rows: Int64[ndarray, "block"]) -> None:
        """Takes what is not hopeless; -inf marks pairs that must not be found."""
        if not scores.size:
            return
        places = np.flatnonzero(scores >= self.cut[:, None])
        if len(places) > 4 * scores.shape[0] * self._k < scores.size:
            self._raise_cut(np.partition(scores, -self._k, axis=1)[:, -self._k])
            places = np.flatnonzero(scores >= self.cut[:, None])
        query_rows, columns = np.divmod(places, scores.shape[1])
        self.add_some(query_rows, gallery_rows[columns], scores.reshape(-1)[places])

    def add_some(
        self,
        query_rows: Int64[ndarray, "pairs"],
        gallery_rows: Int64[ndarray, "pairs"],
        scores: Float32[ndarray, "pairs"],
    ) -> None:
        """Takes pairs that were compared with `cut` already."""
        self._query_rows = np.concatenate([self._query_rows, query_rows])
        self._gallery_rows = np.concatenate([self._gallery_rows, gallery_rows])
        self._scores = np.concatenate([self._scores, scores])
        if len(self._scores) - self._num_sorted > len(self._queries) * self._k:
            self._drop_the_hopeless()
        if len(self._scores) > max(_LARGEST_POOL, 4 * len(self._queries) * self._k):
            # Thousands of ties, as between copies of one picture: only exact scores and ids can tell them apart.
            self._keep_the_best()

    def hits(self) -> SearchHits:
        """The k best of all that was added, by exact score, ties by id."""
        self._drop_the_hopeless()
        self._keep_the_best()
        shape = (len(self._queries), self._k)
        ids, scores = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        places = _places_in_groups(self._query_rows)
        ids[self._query_rows, places] = self._ids[self._gallery_rows]
        scores[self._query_rows, places] = self._scores
        return SearchHits(ids=ids, scores=scores)

    def _drop_the_hopeless(self) -> None:
        self._take(np.lexsort((-self._scores, self._query_rows)))
        is_kth = _places_in_groups(self._query_rows) == self._k - 1
        kth_scores = np.full(len(self._queries), -np.inf, np.float32)
        kth_scores[self._query_rows[is_kth]] = self._scores[is_kth]
        self._raise_cut(kth_scores)
        self._take(np.flatnonzero(self._scores >= self.cut[self._query_rows]))
        self._num_sorted = len(self._scores)

    def _keep_the_best(self) -> None:
        step = max(1, _BYTES_OF_GATHERED_ROWS // (4 * max(1, self._queries.shape[1])))
        for start in range(0, len(self._scores), step):
            part = slice(start, start + step)
            vectors = np.asarray(self._vectors[self._gallery_rows[part]], np.float32)
            self._scores[part] = exact_scores(self._queries[self._query_rows[part]], vectors)
        self._take(np.lexsort((self._ids[self._gallery_rows], -self._scores, self._query_rows)))
        self._take(np.flatnonzero(_places_in_groups(self._query_rows) < self._k))
        self._num_sorted = len(self._scores)

    def _raise_cut(self, kth_scores: Float32[ndarray, "queries"]) -> None:
        """What is truly among the k best has a true score of at least the k-th's least possible one."""
        kth = np.maximum(kth_scores.astype(np.float64), _LOWEST)
        error = self._absolute_error + self._relative_error * (np.abs(kth) + self._absolute_error)
        # Twice: once for the k-th, once for the candidate. A little more, for terms of second order and for rounding.
        lowest = kth - 2.02 * error - 2 * _FLOAT32_ROUNDING * np.abs(kth)
        self.cut = np.maximum(self.cut, np.maximum(lowest, _LOWEST).astype(np.float32))

    def _take(self, places: Int64[ndarray, "taken"]) -> None:
        self._query_rows = self._query_rows[places]
        self._gallery_rows = self._gallery_rows[places]
        self._scores = self._scores[places]


def _places_in_groups(groups: Int64[ndarray, "n"]) -> Int64[ndarray, "n"]:
    """0, 1, 2, ... within each run of equal values; `groups` is ascending."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
