"""Exact positions of a query's relevant pictures in the ranking of a whole gallery, by counting.

A position is the number of pictures that score higher, so no ranking is sorted and none is kept: a block of queries
is scored against the gallery, the scores of the relevant pictures are the thresholds, and all else is compared with
them. Memory is that of one block's scores.

A matrix product rounds one pair of vectors differently at different places of the matrix. So what lies within its
rounding of a threshold is scored again by `exact_scores`: positions depend on the vectors alone, and copies of a
picture tie wherever they stand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from evaluation.classes.pictures import Pictures
from lookalike.exact_search import exact_scores
from lookalike.products import product
from lookalike.world import World

# Where an irrelevant picture of exactly the same score stands: by id, behind the relevant one, or in front of it.
Ties = Literal["index", "optimistic", "pessimistic"]

_BYTES_OF_SCORES = 128 << 20
_GALLERY_ROWS = 4096
_BYTES_OF_GATHERED_ROWS = 4 << 20
_FEWEST_QUERIES, _MOST_QUERIES = 16, 256
# Candidates are compared with one threshold after another; sorting them is faster from 96 thresholds on, and among few
# candidates from one threshold per 256. Measured on 300 to 136,093 candidates.
_SORTED_FROM = 96
_CANDIDATES_PER_THRESHOLD = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """The relevant pictures of one query, best first (then by id), and the irrelevant ones before each of them."""

    num_above: Int64[ndarray, "relevant"]  # of a higher score
    num_tied: Int64[ndarray, "relevant"]  # of the same score
    num_tied_before: Int64[ndarray, "relevant"]  # of the same score and a smaller id

    @property
    def has_ties(self) -> bool:
        return bool(self.num_tied.any())

    def positions(self, ties: Ties) -> Int64[ndarray, "relevant"]:
        """From 0, ascending."""
        before = self.num_above + np.arange(len(self.num_above))
        if ties == "index":
            return before + self.num_tied_before
        return before + self.num_tied if ties == "pessimistic" else before


def place_relevant(
    scores: Float32[ndarray, "gallery"], ids: Int64[ndarray, "gallery"], relevant: Int64[ndarray, "relevant"]
) -> Placement:
    """Counts what stands before each relevant picture.

    Args:
        scores: Of one query; -inf for a picture that is not ranked. The relevant ones are overwritten.
        relevant: Their places in the gallery.
    """
    order = np.lexsort((ids[relevant], -scores[relevant]))
    rows = relevant[order]
    thresholds = scores[rows]
    scores[rows] = -np.inf
    above, at_least = _count_above(scores, thresholds)
    tied, tied_before = at_least - above, np.zeros(len(rows), np.int64)
    for threshold in np.unique(thresholds[tied > 0]):
        is_here = thresholds == threshold
        tied_before[is_here] = np.searchsorted(np.sort(ids[scores == threshold]), ids[rows[is_here]])
    return Placement(above, tied, tied_before)


def _count_above(
    scores: Float32[ndarray, "gallery"], thresholds: Float32[ndarray, "relevant"]
) -> tuple[Int64[ndarray, "relevant"], Int64[ndarray, "relevant"]]:
    """How many scores are above each descending threshold, and how many at least equal it."""
    if not len(thresholds):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    candidates = scores[scores >= thresholds[-1]]
    if len(thresholds) < min(_SORTED_FROM, len(candidates) // _CANDIDATES_PER_THRESHOLD):
        above = np.array([np.count_nonzero(candidates > threshold) for threshold in thresholds], np.int64)
        return above, np.array([np.count_nonzero(candidates >= threshold) for threshold in thresholds], np.int64)
    candidates.sort()
    num_up_to = np.searchsorted(candidates, thresholds, side="right").astype(np.int64)
    num_below = np.searchsorted(candidates, thresholds, side="left").astype(np.int64)
    return len(candidates) - num_up_to, len(candidates) - num_below


def settle_near_ties(
    scores: Float32[ndarray, "gallery"],
    query: Float32[ndarray, "dim"],
    gallery: Pictures,
    relevant: Int64[ndarray, "relevant"],
    *,
    error: float,
) -> None:
    """Puts exact scores in place of those that could be on the wrong side of a relevant picture's.

    Args:
        scores: Of one query, each within `error` of the exact one; -inf stays.
    """
    if not len(relevant):
        return
    _score_exactly(scores, query, gallery, relevant)
    thresholds = np.unique(scores[relevant]).astype(np.float64)
    rows = np.flatnonzero(scores >= thresholds[0] - error)
    inexact = scores[rows].astype(np.float64)
    if len(thresholds) < _SORTED_FROM:
        is_near = np.zeros(len(rows), bool)
        for threshold in thresholds:
            is_near |= np.abs(inexact - threshold) <= error
    else:
        first = np.searchsorted(thresholds, inexact - error, side="left")
        is_near = first < np.searchsorted(thresholds, inexact + error, side="right")
    _score_exactly(scores, query, gallery, rows[is_near])


def _score_exactly(
    scores: Float32[ndarray, "gallery"],
    query: Float32[ndarray, "dim"],
    gallery: Pictures,
    places: Int64[ndarray, "chosen"],
) -> None:
    step = max(1, _BYTES_OF_GATHERED_ROWS // (4 * gallery.dim))
    for start in range(0, len(places), step):
        part = places[start : start + step]
        vectors = gallery.vectors[gallery.rows[part]].astype(np.float32, copy=False)
        scores[part] = exact_scores(np.broadcast_to(query, vectors.shape), vectors)


def queries_at_a_time(num_gallery: int) -> int:
    """A power of two that keeps a block of scores within 128 MiB, but at least 16 and at most 256.

    It depends on the gallery alone, so that every process divides the queries alike.
    """
    fitting = _BYTES_OF_SCORES // (4 * max(1, num_gallery))
    return min(_MOST_QUERIES, max(_FEWEST_QUERIES, 1 << max(0, fitting.bit_length() - 1)))


def score_blocks(
    queries: Pictures, gallery: Pictures, world: World
) -> Iterator[tuple[range, Float32[ndarray, "block gallery"]]]:
    """This rank's blocks of queries, as places in `queries`, and their inner products with the whole gallery.

    The scores are overwritten by the next block.
    """
    size = queries_at_a_time(len(gallery))
    query_buffer = np.zeros((size, queries.dim), np.float32)
    gallery_buffer = np.zeros((_GALLERY_ROWS, gallery.dim), np.float32)
    num_columns = -(-len(gallery) // _GALLERY_ROWS) * _GALLERY_ROWS
    scores = np.empty((size, num_columns), np.float32)
    for start in range(world.rank * size, len(queries), world.size * size):
        block, num_queries = queries.padded_block(start, query_buffer)
        for column in range(0, num_columns, _GALLERY_ROWS):
            columns, _ = gallery.padded_block(column, gallery_buffer)
            scores[:, column : column + _GALLERY_ROWS] = product(block, columns.T)
        yield range(start, start + num_queries), scores[:num_queries, : len(gallery)]


def require_ks(ks: Sequence[int]) -> None:
    """Raises ValueError unless they are different whole numbers from 1, at least one."""
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        raise ValueError(f"ks must be different whole numbers from 1, got {list(ks)}")
