"""Cosines among a few hundred vectors."""

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

from lookalike.products import product


def cosines(vectors: Float[ndarray, "members dim"]) -> Float64[ndarray, "members members"]:
    """Among unit vectors; symmetric, and rounded to float32, so that equal pictures stay equal.

    In float64 the order of a product's sums moves only bits that the rounding drops.
    """
    wide = np.ascontiguousarray(vectors, np.float64)
    rounded = product(wide, wide.T).astype(np.float32).astype(np.float64)
    return np.maximum(rounded, rounded.T)
