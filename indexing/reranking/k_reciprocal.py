"""K-reciprocal re-ranking: hits whose mutual neighbours are the query's mutual neighbours come first.

Source: Zhong, Zheng, Cao, Li 2017, "Re-ranking Person Re-identification with k-reciprocal Encoding", arXiv:1701.08398.
Departures: neighbours are looked for among the query and its shortlist, not in the whole gallery, so that the cost does
not grow with it and no query depends on another; the distance is 1 - cosine, where the authors' code divides squared
Euclidean distances by the largest of each row.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from lookalike.products import product


def reciprocal_scores(
    similarities: Float64[ndarray, "members members"], *, num_neighbours: int, num_averaged: int, cosine_share: float
) -> Float64[ndarray, "hits"]:
    """New scores of the members but the first, which is the query.

    Args:
        similarities: Cosines, symmetric; 1 on the diagonal.
        num_neighbours: k1 of the paper.
        num_averaged: k2 of the paper.
        cosine_share: lambda of the paper.

    Returns:
        (1 - cosine_share) * overlap + cosine_share * cosine, which is 1 minus the paper's final distance. The overlap
        of neighbourhoods lies in 0..1.
    """
    nearest_first = similarities.copy()
    np.fill_diagonal(nearest_first, np.inf)  # each is its own nearest, even where others equal it
    order = np.argsort(-nearest_first, axis=1, kind="stable")
    neighbours = _mutual_neighbours(order, num_neighbours)
    half = _mutual_neighbours(order, max(1, round(num_neighbours / 2)))
    # Of each neighbour, its own narrower neighbours join where more than two thirds of them are there already.
    num_shared = product(neighbours.astype(np.float32), half.T.astype(np.float32))
    joins = neighbours & (3 * num_shared > 2 * half.sum(axis=1))
    neighbours |= product(joins.astype(np.float32), half.astype(np.float32)) > 0
    encoding = np.where(neighbours, np.exp(similarities - 1), 0.0)
    encoding /= encoding.sum(axis=1, keepdims=True)
    encoding = encoding[order[:, :num_averaged]].mean(axis=1)
    shared = np.minimum(encoding[0], encoding[1:]).sum(axis=1)
    overlap = shared / (2 - shared)  # Jaccard: each encoding adds up to 1
    return np.asarray((1 - cosine_share) * overlap + cosine_share * similarities[0, 1:])


def _mutual_neighbours(order: Int64[ndarray, "members members"], k: int) -> Bool[ndarray, "members members"]:
    """Which pairs are among the k nearest of each other; each is its own neighbour too, beside the k."""
    is_near = np.zeros(order.shape, bool)
    np.put_along_axis(is_near, order[:, : k + 1], True, axis=1)
    return is_near & is_near.T
