"""Vectors that are kept out of training, so that a search for them is like a search for something new.

A centroid is drawn towards the vectors that it was computed from, and a graph links each vector to its neighbours: such
queries find more than new ones do.
"""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

_MOST_HELD_OUT = 16_384
_SHARE_OF_TRAINING = 5
# A graph is measured before it gets the vectors held out, and without many it would be too easy to search.
_SHARE_OF_GRAPH = 50


def held_out_rows(num_vectors: int, *, seed: int) -> Int64[ndarray, "held_out"]:
    """At most a fifth of the rows, in random order: the first n are a random sample, too."""
    size = min(_MOST_HELD_OUT, num_vectors // _SHARE_OF_TRAINING)
    return np.random.default_rng([seed, num_vectors]).choice(num_vectors, size, replace=False)


def held_out_of_graph(num_vectors: int, *, seed: int) -> Int64[ndarray, "held_out"]:
    """The first of these, at most a fiftieth of the rows."""
    return held_out_rows(num_vectors, seed=seed)[: num_vectors // _SHARE_OF_GRAPH]
