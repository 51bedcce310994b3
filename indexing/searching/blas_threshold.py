"""From which batch size on FAISS compares queries with centroids by a matrix product.

Below its threshold FAISS scans once per query; by default the threshold is some 128,000 numbers, that is 250 queries of
512, although on most machines the product is faster from about four queries on.
"""

import logging
import threading
from functools import cache
from typing import Any

import numpy as np

from indexing.searching.screening import least_seconds
from lookalike.native_libraries import load_faiss

_NUM_CENTROIDS = 1024
_DIM = 256
_ALWAYS_SCANS = 1 << 30
_calibration_lock = threading.Lock()
_logger = logging.getLogger(__name__)


def set_blas_threshold() -> int:
    """Measures once per process, in some 20 ms, sets FAISS's threshold, and returns it: numbers in a batch.

    Searches that run meanwhile answer the same, at another speed.
    """
    with _calibration_lock:
        return _measured_threshold()


@cache
def _measured_threshold() -> int:
    faiss = load_faiss()
    generator = np.random.default_rng(0)
    index = faiss.IndexFlatIP(_DIM)
    index.add(generator.standard_normal((_NUM_CENTROIDS, _DIM), dtype=np.float32))
    queries = generator.standard_normal((32, _DIM), dtype=np.float32)
    scan = _seconds(faiss, index, queries[:8], threshold=_ALWAYS_SCANS) / 8
    few, many = (_seconds(faiss, index, queries[:size], threshold=0) for size in (8, 32))
    each = max(0.0, (many - few) / 24)
    fixed = max(0.0, few - 8 * each)
    # Where a product never pays, FAISS's own threshold stays.
    threshold = int(np.ceil(fixed / (scan - each))) * _DIM if scan > each else None
    if threshold is not None:
        faiss.cvar.distance_compute_blas_threshold = threshold
    _logger.debug("FAISS multiplies matrices from batches of %s numbers on", threshold)
    return int(faiss.cvar.distance_compute_blas_threshold)


def _seconds(faiss: Any, index: Any, queries: np.ndarray, *, threshold: int) -> float:
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = threshold
    try:
        return least_seconds(lambda: index.search(queries, 16))
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
