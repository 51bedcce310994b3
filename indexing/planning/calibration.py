"""How fast this machine computes: a second's measurement, from which `cost_model.py` predicts."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from indexing.index_types import Codec, IndexType, create_untrained
from indexing.searching.exact import ExactSearcher
from indexing.searching.faiss_searcher import FaissSearcher
from indexing.searching.recall_curve import MeasuredDepth, RecallCurve
from indexing.vector_store import VectorStore
from lookalike.exact_search import exact_scores
from lookalike.native_libraries import load_faiss
from lookalike.products import product
from lookalike.records import Effort, SearchParameters

_SCANNED = 16_384
_BATCH = 256
_SECONDS_EACH = 0.12


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Costs at one vector length; seconds are wall time."""

    flops: float  # multiply and add, per second, of a large matrix product on all cores
    exact_seconds: float  # of one query against one float32 vector, in an exact search of that query alone
    exact_batch_seconds: float  # the same in a large batch
    scan_seconds: Mapping[Codec, float]  # of one query against one code of a FAISS list
    gather_seconds: float  # of one query against one float32 vector at a random place
    rescore_seconds: float  # of scoring one candidate exactly
    call_seconds: float  # that a search takes whatever it searches


def nominal_rates(dim: int) -> MachineRates:
    """Of two cores of a server with AVX-512, rounded.

    The choice of a plan goes by these, so that it is the same on every machine and at every load; only a wish for
    latency is judged by `measure_rates`.
    """
    return MachineRates(
        flops=120e9,
        exact_seconds=0.15e-9 * dim,
        exact_batch_seconds=2 * dim / 120e9,
        scan_seconds={"Flat": 0.15e-9 * dim, "SQfp16": 0.07e-9 * dim, "SQ8": 0.065e-9 * dim, "RaBitQ": 0.02e-9 * dim},
        gather_seconds=0.1e-6 + 0.1e-9 * dim,
        rescore_seconds=0.5e-6 + 1e-9 * dim,  # more than measured: the store may be larger than memory
        call_seconds=100e-6,
    )


@cache
def measure_rates(dim: int) -> MachineRates:
    """Of this machine, now; measured once per process, in a second or two."""
    generator = np.random.default_rng(0)
    # As large as several caches, as a collection is.
    vectors = generator.random((max(_SCANNED, (64 << 20) // (4 * dim)), dim), np.float32) - np.float32(0.5)
    queries = vectors[:_BATCH].copy()
    product_seconds = _least_seconds(lambda: product(queries, vectors[:_SCANNED].T))
    rows = generator.integers(0, len(vectors), 1000)
    exact = ExactSearcher(VectorStore(vectors, np.arange(len(vectors))))
    parameters = SearchParameters()
    return MachineRates(
        flops=2 * len(queries) * _SCANNED * dim / product_seconds,
        exact_seconds=_least_seconds(lambda: exact.search(queries[:1], parameters)) / len(vectors),
        exact_batch_seconds=_least_seconds(lambda: exact.search(queries, parameters)) / len(vectors) / len(queries),
        scan_seconds={codec: _scan_seconds(codec, vectors[:_SCANNED]) for codec in ("Flat", "SQfp16", "SQ8", "RaBitQ")},
        gather_seconds=_least_seconds(lambda: np.einsum("nd,d->n", vectors[rows], queries[0])) / len(rows),
        rescore_seconds=_least_seconds(lambda: exact_scores(np.repeat(queries[:1], len(rows), 0), vectors[rows]))
        / len(rows),
        call_seconds=_call_seconds(dim),
    )


def rates_to_tree(rates: MachineRates) -> dict[str, Any]:
    """For a manifest's measurements."""
    return {
        "gigaflops": round(rates.flops / 1e9, 1),
        "nanoseconds_per_exact_vector": round(1e9 * rates.exact_seconds, 2),
        "nanoseconds_per_exact_vector_in_batches": round(1e9 * rates.exact_batch_seconds, 2),
        "nanoseconds_per_code": {name: round(1e9 * s, 2) for name, s in rates.scan_seconds.items()},
        "nanoseconds_per_gathered_vector": round(1e9 * rates.gather_seconds, 1),
        "nanoseconds_per_rescored_candidate": round(1e9 * rates.rescore_seconds, 1),
        "microseconds_per_call": round(1e6 * rates.call_seconds, 1),
    }


def _scan_seconds(codec: Codec, vectors: np.ndarray) -> float:
    faiss = load_faiss()
    index = faiss.index_factory(vectors.shape[1], codec, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    query = vectors[:1].copy()
    return _least_seconds(lambda: index.search(query, 10)) / len(vectors)


def _call_seconds(dim: int) -> float:
    vectors = np.eye(64, dim, dtype=np.float32)
    index_type = IndexType("hnsw", num_links=4)
    index = create_untrained(index_type, dim, seed=0)
    index.add(vectors)
    store = VectorStore(vectors, np.arange(len(vectors)))
    searcher = FaissSearcher(index, index_type, store, [MeasuredDepth(1, RecallCurve(), Effort(breadth=1))])
    return _least_seconds(lambda: searcher.search(vectors[:1], SearchParameters()))


def _least_seconds(work: Callable[[], object]) -> float:
    """The least of several runs: other programs can only add to it."""
    work()
    least, end = float("inf"), time.perf_counter() + _SECONDS_EACH
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least
