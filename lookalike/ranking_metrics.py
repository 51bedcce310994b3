"""Metrics of one query, from the positions of its relevant pictures in its ranking.

A ranking enters a metric only through the positions of the pictures that count as found, so this is all that any
engine has to deliver: brute force by counting, an index and a server by the list that they return. Where a list ends
before all relevant pictures are found, the best and the worst continuation bound every metric: see `bounds`.

Three numbers are called recall@k in the field; here each has its own name: `hit_rate@k` (metric learning: is one of the
first k relevant?), `recall@k` (which share of the relevant ones is among the first k?) and `rs_target@k` (the same,
divided by min(k, relevant): what the RS@k loss stands for).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

RECALL_LEVELS: Float64[ndarray, "levels"] = np.linspace(0, 1, 21)  # where precision-recall curves are drawn

# Ascending positions from 0 of all relevant pictures, ignored ones taken out of the ranking -> a value in [0, 1]; NaN
# where nothing is relevant.
Metric = Callable[[Int64[ndarray, "relevant"]], float]


def hit_rate_at_k(positions: Int64[ndarray, "relevant"], k: int) -> float:
    """1 if one of the first k is relevant, else 0."""
    return float(positions[0] < k) if len(positions) else float("nan")


def recall_at_k(positions: Int64[ndarray, "relevant"], k: int) -> float:
    """Share of the relevant pictures that are among the first k; mR@k of the landmark benchmarks."""
    return float(np.searchsorted(positions, k) / len(positions)) if len(positions) else float("nan")


def rs_target_at_k(positions: Int64[ndarray, "relevant"], k: int) -> float:
    """Relevant ones among the first k, divided by the most that could be there: min(k, relevant).

    Source: Patel, Tolias, Matas 2022, CVPR, as its code normalises; the paper's equation 1 divides by the relevant.
    """
    return float(np.searchsorted(positions, k) / min(k, len(positions))) if len(positions) else float("nan")


def r_precision(positions: Int64[ndarray, "relevant"]) -> float:
    """Share of relevant ones among the first R, where R is their number."""
    return recall_at_k(positions, len(positions))


def average_precision_at_r(positions: Int64[ndarray, "relevant"]) -> float:
    """MAP@R: (1/R) sum of precision@i over those of the first R positions that are relevant.

    Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check", arXiv:2003.08505, section 4.2.
    """
    if not len(positions):
        return float("nan")
    found = positions[positions < len(positions)]
    return float((np.arange(1, len(found) + 1) / (found + 1)).sum() / len(positions))


def average_precision(positions: Int64[ndarray, "relevant"]) -> float:
    """Mean over the relevant pictures of the precision at each: the rectangular rule, scikit-learn's definition."""
    if not len(positions):
        return float("nan")
    return float((np.arange(1, len(positions) + 1) / (positions + 1)).mean())


def trapezoid_average_precision(positions: Int64[ndarray, "relevant"]) -> float:
    """Area under the precision-recall curve by the trapezoid rule: AP of Oxford and Paris.

    AP = 1/n sum_j (j/p_j + (j+1)/(p_j+1)) / 2, where p_j is the position of the j-th relevant picture, both from 0,
    and j/p_j is 1 at p_j = 0. The rectangular rule gives up to about a point more.

    Source: Philbin et al. 2007, "Object retrieval with large vocabularies", section 4; `compute_ap` of its evaluation.
    """
    if not len(positions):
        return float("nan")
    found = np.arange(len(positions))
    before = np.divide(found, positions, out=np.ones(len(positions)), where=positions > 0)
    after = (found + 1) / (positions + 1)
    return float(((before + after) / 2).sum() / len(positions))


def landmark_precision_at_k(positions: Int64[ndarray, "relevant"], k: int) -> float:
    """mP@k of Oxford and Paris: share of relevant ones among the first k, k at most the last relevant one's place.

    The official definition: a ranking whose relevant pictures all stand before k is not punished for what follows.
    """
    if not len(positions):
        return float("nan")
    depth = min(int(positions[-1]) + 1, k)
    return float(np.searchsorted(positions, depth) / depth)


def class_metrics(ks: Sequence[int]) -> dict[str, Metric]:
    """What is said of pictures with classes, by name."""
    metrics: dict[str, Metric] = {}
    for name, at_k in (("hit_rate", hit_rate_at_k), ("recall", recall_at_k), ("rs_target", rs_target_at_k)):
        metrics |= {f"{name}@{k}": partial(at_k, k=k) for k in ks}
    return metrics | {"map@r": average_precision_at_r, "map": average_precision, "r_precision": r_precision}


def landmark_metrics(ks: Sequence[int]) -> dict[str, Metric]:
    """What is said of Oxford and Paris, by name."""
    metrics: dict[str, Metric] = {"map": trapezoid_average_precision}
    for k in ks:
        metrics |= {f"mp@{k}": partial(landmark_precision_at_k, k=k), f"mr@{k}": partial(recall_at_k, k=k)}
    return metrics


def precision_at_recall(positions: Int64[ndarray, "relevant"], levels: Float64[ndarray, "levels"]) -> ndarray:
    """Interpolated precision: the greatest precision at or beyond each level of recall; NaN where nothing is relevant.

    Args:
        levels: In [0, 1].

    Source: Manning, Raghavan, Schütze 2008, "Introduction to Information Retrieval", section 8.4.
    """
    if not len(positions):
        return np.full(len(levels), np.nan)
    precision = np.arange(1, len(positions) + 1) / (positions + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    needed = np.ceil(levels * len(positions) - 1e-9).astype(np.int64)  # relevant ones that a level asks for
    return best_from_here[np.maximum(needed, 1) - 1]


def measure(
    metrics: Mapping[str, Metric], positions: Sequence[Int64[ndarray, "_"]]
) -> dict[str, Float64[ndarray, "queries"]]:
    """The values of every query."""
    return {name: np.array([metric(own) for own in positions], np.float64) for name, metric in metrics.items()}


def positions_in_list(
    ranked_ids: Int64[ndarray, "depth"], relevant_ids: Int64[ndarray, "_"], ignored_ids: Int64[ndarray, "_"]
) -> tuple[Int64[ndarray, "found"], int]:
    """Positions of the relevant pictures that a list holds, ignored ones taken out first, and the length that is left.

    Args:
        ranked_ids: Best first; -1 marks that there are no more.
        ignored_ids: Junk, or the query itself.

    Raises:
        ValueError: the list names an id twice, so that its positions mean nothing.
    """
    listed = ranked_ids[ranked_ids >= 0]
    if len(np.unique(listed)) != len(listed):
        raise ValueError("the ranking names an id twice")
    kept = listed[~np.isin(listed, ignored_ids)]
    return np.flatnonzero(np.isin(kept, relevant_ids)).astype(np.int64), len(kept)


def with_missing_last(
    found: Int64[ndarray, "found"], *, num_relevant: int, num_ranked: int
) -> Int64[ndarray, "relevant"]:
    """Positions of all relevant pictures, if those that a list does not hold stand at the very end of the ranking."""
    num_missing = num_relevant - len(found)
    return np.concatenate([found, np.arange(num_ranked - num_missing, num_ranked)])


def bounds(
    metric: Metric, found: Int64[ndarray, "found"], *, num_relevant: int, depth: int, num_ranked: int
) -> tuple[float, float]:
    """The least and the greatest value over all continuations of a list; equal where the list decides it.

    Each metric here falls when a relevant picture moves back, so the extremes have the missing ones at the very end
    and directly after the list.

    Args:
        found: Positions of the relevant pictures in the list.
        num_relevant: Of the query, found or not.
        depth: Length of the list without ignored pictures.
        num_ranked: Pictures of a whole ranking without ignored ones.

    Raises:
        ValueError: the numbers contradict each other.
    """
    num_missing = num_relevant - len(found)
    if num_missing < 0 or depth + num_missing > num_ranked:
        raise ValueError(
            f"a list of {depth} with {len(found)} of {num_relevant} relevant pictures cannot come from {num_ranked}"
        )
    best = np.concatenate([found, depth + np.arange(num_missing)])
    worst = with_missing_last(found, num_relevant=num_relevant, num_ranked=num_ranked)
    return metric(worst), metric(best)
