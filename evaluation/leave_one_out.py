"""Leave-one-out retrieval: every picture searches all others; relevant are those of its class.

The protocol of SOP, Cars196, CUB and iNaturalist. The query is removed from its ranking by id, never by position.
Pictures that are alone in their class cannot be found by anybody: they stay in the gallery and are no queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from evaluation.bootstrap import Estimate, bootstrap_mean
from lookalike.errors import DataError
from lookalike.exact_search import exact_search
from lookalike.progress import track
from lookalike.ranking_metrics import average_precision_at_r, hit_rate_at_k, relevance_of_ranking

_QUERIES_AT_A_TIME = 1024

# (query vectors, query ids, depth) -> ranked ids without the query itself, -1 where there are no more.
Ranker = Callable[[ndarray, ndarray, int], ndarray]


@dataclass(frozen=True)
class LeaveOneOutResult:
    """Values per query, their means with intervals, and the start of each ranking."""

    query_ids: Int64[ndarray, "queries"]
    query_labels: Int64[ndarray, "queries"]
    per_query: dict[str, Float64[ndarray, "queries"]]  # metric name -> values in [0, 1]
    ranked_ids: Int64[ndarray, "queries depth"]
    num_gallery: int
    num_alone: int  # pictures that are the only one of their class, and thus no queries

    def estimates(self) -> dict[str, Estimate]:
        return {name: bootstrap_mean(values, self.query_labels) for name, values in self.per_query.items()}


def evaluate_leave_one_out(
    vectors: Float32[ndarray, "gallery dim"],
    ids: Int64[ndarray, "gallery"],
    labels: Int64[ndarray, "gallery"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    rank: Ranker | None = None,
) -> LeaveOneOutResult:
    """Hit rates and MAP@R of every picture against all others.

    Args:
        vectors: Unit rows.
        ids: Unique.
        labels: Class of each row; -1 (none) is refused.
        ks: Of the hit rates, named R@k as metric learning does.
        rank: Ranks by an index, say; brute force where None.

    Raises:
        DataError: a picture has no class, or no class has two pictures.
    """
    if (labels < 0).any():
        raise DataError(f"{int((labels < 0).sum())} pictures have no class, so their answers cannot be judged.")
    _, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    num_relevant_of_all = (sizes[members] - 1).astype(np.int64)
    queries = np.flatnonzero(num_relevant_of_all > 0)
    if not len(queries):
        raise DataError("no class has two pictures, so no picture can be found by another.")
    num_relevant = num_relevant_of_all[queries]
    depth = max(*ks, int(num_relevant.max()))
    rank = rank or brute_force_ranker(vectors, ids)
    ranked_ids = rank(vectors[queries], ids[queries], depth)
    ids_of_label = {int(label): ids[labels == label] for label in np.unique(labels[queries])}
    relevance = relevance_of_ranking(ranked_ids, [ids_of_label[int(labels[query])] for query in queries])
    per_query = {f"R@{k}": hit_rate_at_k(relevance, k) for k in ks}
    per_query["MAP@R"] = average_precision_at_r(relevance, num_relevant)
    return LeaveOneOutResult(
        query_ids=ids[queries],
        query_labels=labels[queries],
        per_query=per_query,
        ranked_ids=ranked_ids,
        num_gallery=len(ids),
        num_alone=len(ids) - len(queries),
    )


def brute_force_ranker(vectors: Float32[ndarray, "gallery dim"], ids: Int64[ndarray, "gallery"]) -> Ranker:
    def rank(queries: ndarray, query_ids: ndarray, depth: int) -> ndarray:
        starts = range(0, len(queries), _QUERIES_AT_A_TIME)
        parts = []
        for start in track(starts, total=len(starts), description="ranking", unit="blocks of queries"):
            block = slice(start, start + _QUERIES_AT_A_TIME)
            parts.append(exact_search(queries[block], vectors, ids, k=depth, excluded_ids=query_ids[block]).ids)
        return np.concatenate(parts)

    return rank


def without_query(
    ranked_ids: Int64[ndarray, "queries depth_plus_one"], query_ids: Int64[ndarray, "queries"]
) -> Int64[ndarray, "queries depth"]:
    """Removes each query from its ranking by id; a ranking that lacks it loses its last place instead."""
    is_query = ranked_ids == query_ids[:, None]
    is_query[~is_query.any(axis=1), -1] = True
    return ranked_ids[~is_query].reshape(len(ranked_ids), -1)


def paired_difference(better: LeaveOneOutResult, worse: LeaveOneOutResult, metric: str) -> Estimate:
    """Mean of `better - worse` over the same queries, with its 95% interval.

    Raises:
        ValueError: the two were measured on different queries.
    """
    if not np.array_equal(better.query_ids, worse.query_ids):
        raise ValueError("a paired comparison needs the same queries on both sides")
    return bootstrap_mean(better.per_query[metric] - worse.per_query[metric], better.query_labels)
