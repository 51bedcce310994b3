"""Fast, inexact products of queries and stored vectors, each with a proven bound of its error.

Three ways on a CPU, whose results are the same after re-scoring: one matrix-vector product per query, a float32 matrix
product, and a bfloat16 matrix product, which needs a conversion of each block but takes a third of the time where the
processor has instructions for it; a process without torch goes without it. Which one pays at which batch size is
measured on the machine, once per process and vector length.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray

from lookalike.exact_search import float32_screening_error
from lookalike.native_libraries import uses_torch
from lookalike.products import as_tensor
from lookalike.products import product as matrix_product

Product = Literal["vector", "float32", "bfloat16"]
PRODUCTS: tuple[Product, ...] = ("vector", "float32", "bfloat16")

# A block's conversion stays in the processor's cache.
ROWS_OF_CONVERTED_BLOCK = 2048
_BFLOAT16_ROUNDING = 2.0**-8
# With fewer rows torch may take a matrix-vector product, whose sums may be kept in bfloat16.
_FEWEST_BFLOAT16_ROWS = 16
ROWS_OF_CALIBRATION = 4096
_REPETITIONS = 7
_calibration_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class NormBounds:
    """Upper bounds over all stored vectors."""

    largest: float  # of a vector's norm
    largest_lost: float  # of the norm of what rounding to bfloat16 takes from a vector


def measure_norms(vectors: ndarray) -> NormBounds:
    """Of rows [vectors, dim], float32 or float16, in one pass.

    Raises:
        ValueError: a vector is not finite.
    """
    # A sum of squares in float32 may be a little too small.
    slack = 1 + vectors.shape[1] * 2.0**-23
    if not uses_torch():
        norm = slack * _largest_norm(vectors)
        return NormBounds(largest=norm, largest_lost=norm * _BFLOAT16_ROUNDING)
    largest = largest_lost = 0.0
    for start in range(0, len(vectors), ROWS_OF_CONVERTED_BLOCK):
        block = as_tensor(vectors[start : start + ROWS_OF_CONVERTED_BLOCK]).float()
        largest = max(largest, float(block.square().sum(dim=1).max()))
        largest_lost = max(largest_lost, float((block - block.bfloat16().float()).square().sum(dim=1).max()))
        if not np.isfinite(float(block.sum())) or not np.isfinite(largest):
            raise _not_finite(start, len(block))
    return NormBounds(largest=slack * largest**0.5, largest_lost=slack * largest_lost**0.5)


def _largest_norm(vectors: ndarray) -> float:
    largest = 0.0
    for start in range(0, len(vectors), ROWS_OF_CONVERTED_BLOCK):
        block = np.asarray(vectors[start : start + ROWS_OF_CONVERTED_BLOCK], np.float32)
        largest = max(largest, float(np.einsum("nd,nd->n", block, block).max()))
        if not np.isfinite(block).all() or not np.isfinite(largest):
            raise _not_finite(start, len(block))
    return largest**0.5


def _not_finite(start: int, num_rows: int) -> ValueError:
    return ValueError(f"a stored vector, in rows {start} to {start + num_rows - 1}, is not finite")


class Screening:
    """Products of some queries with blocks of vectors, in one of the three ways."""

    def __init__(self, queries: Float32[ndarray, "queries dim"], norms: NormBounds, *, product: Product) -> None:
        self._queries, self._product = queries, product
        self.absolute_error: Float64[ndarray, queries] = float32_screening_error(queries, largest_norm=norms.largest)
        self.relative_error = 0.0
        if product == "bfloat16":
            rows = max(len(queries), _FEWEST_BFLOAT16_ROWS)
            padded = np.zeros((rows, queries.shape[1]), np.float32)
            padded[: len(queries)] = queries
            import torch

            self._rounded = torch.from_numpy(padded).bfloat16()
            rounded = self._rounded[: len(queries)].float().numpy()
            # <q, v> - <q', v'> = <q - q', v> + <q', v - v'>; then the sum in float32, then its rounding to bfloat16.
            lost = np.linalg.norm((queries - rounded).astype(np.float64), axis=1)
            kept = np.linalg.norm(rounded.astype(np.float64), axis=1)
            self.absolute_error = 2 * self.absolute_error + lost * norms.largest + kept * norms.largest_lost
            self.relative_error = _BFLOAT16_ROUNDING * (1 + _BFLOAT16_ROUNDING)

    def scores(self, block: ndarray) -> Float32[ndarray, "queries rows"]:
        """Within the bounds of the error from the true products with the rows of `block`."""
        if self._product == "bfloat16":
            scores: ndarray = (self._rounded @ as_tensor(block).bfloat16().T)[: len(self._queries)].float().numpy()
            return scores
        if block.dtype != np.float32:
            block = as_tensor(block).float().numpy() if uses_torch() else block.astype(np.float32)
        if self._product == "vector":
            scores = np.empty((len(self._queries), len(block)), np.float32)
            for query, row in zip(self._queries, scores, strict=True):
                np.dot(block, query, out=row)
            return scores
        return matrix_product(self._queries, block.T)


def fastest_product(num_queries: int, dim: int, *, among: tuple[Product, ...] = PRODUCTS) -> Product:
    """The way that takes least time for a batch of this size on this machine."""
    costs = calibrated_costs(dim)
    known = [product for product in among if product in costs]
    return min(known, key=lambda product: costs[product][0] + num_queries * costs[product][1])


def calibrated_costs(dim: int) -> dict[Product, tuple[float, float]]:
    """Seconds per block that each way takes, apart from queries and for each of them; some 30 ms, once per length."""
    with _calibration_lock:
        return _measure_costs(dim)


@lru_cache(maxsize=64)
def _measure_costs(dim: int) -> dict[Product, tuple[float, float]]:
    generator = np.random.default_rng(0)
    block = generator.standard_normal((ROWS_OF_CALIBRATION, dim), dtype=np.float32)
    queries = generator.standard_normal((64, dim), dtype=np.float32)
    norms = measure_norms(block)

    def seconds(product: Product, num_queries: int) -> float:
        screening = Screening(queries[:num_queries], norms, product=product)
        return least_seconds(
            lambda: [
                screening.scores(block[start : start + ROWS_OF_CONVERTED_BLOCK])
                for start in range(0, len(block), ROWS_OF_CONVERTED_BLOCK)
            ]
        )

    costs: dict[Product, tuple[float, float]] = {"vector": (0.0, seconds("vector", 1))}
    products: tuple[Product, ...] = ("float32", "bfloat16") if uses_torch() else ("float32",)
    for product in products:
        # Not 1, which would become a matrix-vector product.
        few, many = seconds(product, 2), seconds(product, 64)
        each = max(0.0, (many - few) / 62)
        costs[product] = (max(0.0, few - 2 * each), each)
    return costs


def least_seconds(work: Callable[[], object]) -> float:
    """The least of several runs: other programs can only add to it."""
    least = float("inf")
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least
