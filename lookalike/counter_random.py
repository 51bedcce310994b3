"""Random numbers that are a function of counters: nothing to save, the same on every process and after every resume."""

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray


def counter_hash(*counters: int | ndarray) -> UInt64[ndarray, "*shape"]:
    """64 uniform bits for each combination of counters, which broadcast; order matters.

    Args:
        counters: At least one; integers from -2^63 to 2^64 - 1, or arrays of 64-bit integers.

    Source: SplitMix64, Steele, Lea, Flood, OOPSLA 2014, with the constants in common use, once per counter.
    """
    first, *rest = (_as_words(counter) for counter in counters)
    state = np.array(first)
    for words in rest:
        state = np.asarray(_splitmix64(state) ^ words)
    return _splitmix64(state)


def _as_words(counter: int | ndarray) -> UInt64[ndarray, "*shape"]:
    if isinstance(counter, int):
        return np.array(counter % 2**64, dtype=np.uint64)
    return np.ascontiguousarray(counter).view(np.uint64).reshape(counter.shape)


def _splitmix64(state: UInt64[ndarray, "*shape"]) -> UInt64[ndarray, "*shape"]:
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        mixed = state + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))
