"""Brute-force search by streaming over blocks of the gallery: the oracle for every index, in bounded memory."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from lookalike.records import SearchHits

_BYTES_OF_SCORES = 64 << 20


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
        gallery: May be memory-mapped; it is read block by block, some 64 MiB of scores at a time.
        ids: Of the gallery rows; unique.
        k: At least 1; where the gallery is smaller, ids end in -1.
        excluded_ids: One id per query that must not be found: the query itself in leave-one-out protocols.

    Raises:
        ValueError: shapes do not fit, or a query is not finite.
    """
    require_searchable(queries, dim=gallery.shape[1], k=k)
    best = SearchHits(ids=np.full((len(queries), 0), -1, np.int64), scores=np.zeros((len(queries), 0), np.float32))
    block = max(1, _BYTES_OF_SCORES // (4 * max(1, len(queries))))
    for start in range(0, len(gallery), block):
        block_ids = ids[start : start + block]
        scores = queries @ np.asarray(gallery[start : start + block], dtype=np.float32).T
        if excluded_ids is not None:
            scores[excluded_ids[:, None] == block_ids[None, :]] = -np.inf
        best = merge_hits([best, _hits_of_block(scores, block_ids, k)], k=k)
    return merge_hits([best], k=k)


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


def _hits_of_block(scores: Float32[ndarray, "queries block"], block_ids: Int64[ndarray, "block"], k: int) -> SearchHits:
    if scores.shape[1] > k:
        kth_score = np.partition(scores, -k, axis=1)[:, -k]
        # Every row tied with the k-th is kept until the final order by id, or ties would be cut at random.
        width = int((scores >= kth_score[:, None]).sum(axis=1).max())
        columns = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        return SearchHits(ids=block_ids[columns], scores=np.take_along_axis(scores, columns, axis=1))
    return SearchHits(ids=np.broadcast_to(block_ids, scores.shape).copy(), scores=scores)
