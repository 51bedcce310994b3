"""Metrics of a ranking: exact, per query, from ranked ids and relevant ids. The definition of "correct" for all stages.

Three numbers are called recall@k in the field; here each has its own name:
`hit_rate_at_k` (metric learning: is at least one of the first k relevant?), `recall_at_k` (the fraction of the relevant
ones among the first k) and the training loss's own target, which divides by min(k, relevant).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray


def relevance_of_ranking(
    ranked_ids: Int64[ndarray, "queries k"], relevant_ids: Sequence[Int64[ndarray, "_"]]
) -> Bool[ndarray, "queries k"]:
    """Whether each ranked id is relevant to its query; -1 (no image) never is.

    Raises:
        ValueError: the numbers of queries differ, or an id is ranked twice for one query.
    """
    if len(relevant_ids) != len(ranked_ids):
        raise ValueError(f"{len(ranked_ids)} rankings but {len(relevant_ids)} sets of relevant ids")
    relevance = np.zeros(ranked_ids.shape, dtype=bool)
    for query, (ranked, relevant) in enumerate(zip(ranked_ids, relevant_ids, strict=True)):
        found = ranked[ranked >= 0]
        if len(np.unique(found)) != len(found):
            raise ValueError(f"the ranking of query {query} names an id twice")
        relevance[query] = np.isin(ranked, relevant) & (ranked >= 0)
    return relevance


def hit_rate_at_k(relevance: Bool[ndarray, "queries depth"], k: int) -> Float64[ndarray, "queries"]:
    """1 where at least one of the first k is relevant, else 0."""
    _require_k(relevance, k)
    return np.asarray(relevance[:, :k].any(axis=1), dtype=np.float64)


def recall_at_k(
    relevance: Bool[ndarray, "queries depth"], num_relevant: Int64[ndarray, "queries"], k: int
) -> Float64[ndarray, "queries"]:
    """Relevant ones among the first k, divided by all relevant ones; NaN for a query without any."""
    _require_k(relevance, k)
    with np.errstate(invalid="ignore"):
        return np.asarray(relevance[:, :k].sum(axis=1) / num_relevant)


def average_precision_at_r(
    relevance: Bool[ndarray, "queries depth"], num_relevant: Int64[ndarray, "queries"]
) -> Float64[ndarray, "queries"]:
    """MAP@R per query: (1/R) sum over the first R positions of precision@i where position i is relevant.

    R is the query's number of relevant images; NaN where it is 0.

    Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check", arXiv:2003.08505, section 4.2.

    Raises:
        ValueError: the rankings are shorter than the largest R, so the value would silently be too low.
    """
    _require_depth(relevance, int(num_relevant.max(initial=0)))
    positions = np.arange(1, relevance.shape[1] + 1)
    counts = relevance & (positions[None, :] <= num_relevant[:, None])
    precision = np.cumsum(counts, axis=1) / positions
    with np.errstate(invalid="ignore"):
        return np.asarray((precision * counts).sum(axis=1) / num_relevant)


def _require_k(relevance: Bool[ndarray, "queries depth"], k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _require_depth(relevance, k)


def _require_depth(relevance: Bool[ndarray, "queries depth"], depth: int) -> None:
    if relevance.shape[1] < depth:
        raise ValueError(f"rankings hold {relevance.shape[1]} images, this metric needs the first {depth}")
