"""Diffusion: a random walk with restart from the query's first hits, over the graph of mutual neighbours.

Source: Iscen, Tolias, Avrithis, Furon, Chum 2017, "Efficient Diffusion on Region Manifolds: Recovering Small Objects
with Compact CNN Representations", arXiv:1611.05113, sections 3 and 4 (`truncated` to a shortlist), one vector per
picture.
"""

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray
from scipy.sparse import csr_array, eye_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import cg

# Residual of the linear system, of the right side's length.
_TOLERANCE = 1e-8


def diffused_scores(
    similarities: Float64[ndarray, "hits hits"],
    to_query: Float64[ndarray, "hits"],
    *,
    num_neighbours: int,
    num_seeds: int,
    alpha: float,
    gamma: float,
) -> Float64[ndarray, "hits"]:
    """How much of a walk is spent at each hit; 0 for those that it never reaches.

    It solves (I - alpha * S) f = (1 - alpha) * y by conjugate gradients; S is the affinity matrix, normalised by the
    roots of its row sums.

    Args:
        similarities: Cosines among the hits, symmetric.
        to_query: Cosines to the query, descending.
        num_neighbours: Edges join hits each of which is among so many nearest of the other.
        num_seeds: First hits where the walk starts, with the weights y: cosines to the power of gamma.
    """
    affinity = np.where(mutual_neighbours(similarities, num_neighbours), np.maximum(similarities, 0) ** gamma, 0.0)
    sums = affinity.sum(axis=1)
    roots = np.sqrt(np.divide(1, sums, out=np.zeros_like(sums), where=sums > 0))
    transitions = csr_array(roots[:, None] * affinity * roots)
    seeds = np.zeros(len(to_query))
    seeds[:num_seeds] = np.maximum(to_query[:num_seeds], 0) ** gamma
    system = (eye_array(len(seeds)) - alpha * transitions).tocsr()
    solution, failed = cg(system, (1 - alpha) * seeds, rtol=_TOLERANCE)
    assert not failed, "the system is positive definite, so as many steps as it has rows suffice"
    return np.where(_reached(transitions, seeds), np.maximum(solution, 0), 0.0)


def mutual_neighbours(similarities: Float64[ndarray, "hits hits"], num_neighbours: int) -> Bool[ndarray, "hits hits"]:
    """Which pairs are among the nearest of each other; equal similarities are ordered by position, none is its own."""
    others = similarities.copy()
    np.fill_diagonal(others, -np.inf)
    order = np.argsort(-others, axis=1, kind="stable")[:, : min(num_neighbours, len(others) - 1)]
    is_near = np.zeros(others.shape, bool)
    np.put_along_axis(is_near, order, True, axis=1)
    return is_near & is_near.T


def _reached(transitions: csr_array, seeds: Float64[ndarray, "hits"]) -> Bool[ndarray, "hits"]:
    """Hits in a part of the graph that holds a seed."""
    _, part_of = connected_components(transitions, directed=False)
    return np.isin(part_of, part_of[seeds > 0])
