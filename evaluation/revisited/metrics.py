"""The official metrics, from the positions of the relevant pictures in a ranking without its junk."""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray


def average_precision(positions: Int64[ndarray, "relevant"]) -> float:
    """Area under the precision-recall curve by the trapezoid rule; NaN without relevant pictures.

    AP = 1/n sum_j (j/p_j + (j+1)/(p_j+1)) / 2, where p_j is the position of the j-th relevant picture, both from 0,
    and j/p_j is 1 at p_j = 0. The rectangular rule of other tools gives up to about a point more.

    Args:
        positions: From 0, ascending, of all relevant pictures, junk taken out of the ranking.

    Source: Philbin et al. 2007, "Object retrieval with large vocabularies", section 4; `compute_ap` of its evaluation.
    """
    if not len(positions):
        return float("nan")
    found = np.arange(len(positions))
    before = np.divide(found, positions, out=np.ones(len(positions)), where=positions > 0)
    after = (found + 1) / (positions + 1)
    return float(((before + after) / 2).sum() / len(positions))


def precision_at_k(positions: Int64[ndarray, "relevant"], k: int) -> float:
    """Share of relevant ones among the first k, where k shrinks to the place of the last relevant one.

    The official definition: a ranking whose relevant pictures all stand before k is not punished for what follows.
    """
    if not len(positions):
        return float("nan")
    depth = min(int(positions.max()) + 1, k)
    return float((positions < depth).sum() / depth)


def recall_at_k(positions: Int64[ndarray, "relevant"], k: int) -> float:
    """Share of the relevant pictures that stand among the first k."""
    if not len(positions):
        return float("nan")
    return float((positions < k).sum() / len(positions))
