"""Average query expansion: the mean of the query and its first hits searches again.

Source: Chum, Philbin, Sivic, Isard, Zisserman 2007, "Total Recall: Automatic Query Expansion with a Generative Feature
Model for Object Retrieval", section 3 (`average query expansion`). The paper averages the hits whose geometry was
verified; with global descriptors the first ones stand for them.
"""

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray


def expand_by_average(
    query: Float32[ndarray, "dim"], neighbours: Float32[ndarray, "neighbours dim"]
) -> Float32[ndarray, "dim"]:
    """The query that searches again, of unit length."""
    return weighted_direction(query, neighbours, np.ones(len(neighbours)))


def weighted_direction(
    vector: Float32[ndarray, "dim"],
    neighbours: Float32[ndarray, "neighbours dim"],
    weights: Float64[ndarray, "neighbours"],
) -> Float32[ndarray, "dim"]:
    """`vector`, of weight 1, plus weighted neighbours, scaled to unit length; `vector` itself where nothing is added.

    Also where everything cancels out, so that there is no direction.
    """
    if not weights.any():
        return vector
    total = vector + np.einsum("n,nd->d", weights, neighbours)
    length = np.linalg.norm(total)
    return (total / length).astype(np.float32) if length > 0 else vector
