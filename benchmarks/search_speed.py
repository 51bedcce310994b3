"""What one query costs, alone and in batches: exact search, FAISS's own flat index, IVF and graphs; filters beside it.

python benchmarks/search_speed.py            # 100,000 x 512, some minutes
python benchmarks/search_speed.py --save     # and writes it to benchmarks/results/search_speed_cpu.md
python benchmarks/search_speed.py --vectors 1000000 --types IVF4096,SQ8
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lookalike.native_libraries import set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np
from frozen_backbone import footer
from live_index import VIEWS_PER_LANDMARK, views_of
from numpy import ndarray

from indexing.index_types import IndexType, create_untrained
from indexing.searching.blas_threshold import set_blas_threshold
from indexing.searching.exact import ExactSearcher
from indexing.searching.faiss_searcher import FaissSearcher
from indexing.searching.recall_curve import MeasuredDepth, RecallCurve
from indexing.searching.screening import calibrated_costs, fastest_product
from indexing.vector_store import IDS_NAME, VECTORS_NAME, VectorStore
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import load_faiss, load_torch
from lookalike.records import Effort, SearchParameters

RESULT = Path(__file__).parent / "results" / "search_speed_cpu.md"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 400)
K = 10
REPETITIONS = 5
NUM_SINGLE = 100
FRACTIONS = (0.99, 0.5, 0.1, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--types", nargs="*", default=["IVF1024,Flat", "IVF1024,SQ8", "IVF1024,RaBitQ"])
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.parent.name}/{RESULT.name} too")
    arguments = parser.parse_args()
    started = time.perf_counter()
    load_torch(num_threads=1)
    load_faiss(num_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        store, queries = make_collection(Path(folder), arguments.vectors, arguments.dim)
        lines = [
            "# What a query costs",
            "",
            f"{arguments.vectors:,} x {arguments.dim} float32, memory-mapped, k = {K};",
        ]
        lines += [f"one thread, CPU milliseconds per query, least of {REPETITIONS} rounds.", ""]
        lines += [*exact_lines(store, queries), ""]
        lines += approximate_lines(store, queries, [IndexType.parse(name) for name in arguments.types])
    lines += ["", *footer(time.perf_counter() - started, threads=1)]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_collection(folder: Path, num_vectors: int, dim: int) -> tuple[VectorStore, ndarray]:
    """Views of landmarks, written block by block, and other views of some of them as queries."""
    generator = np.random.default_rng(0)
    landmarks = generator.standard_normal((num_vectors // VIEWS_PER_LANDMARK, dim), dtype=np.float32)
    vectors = np.lib.format.open_memmap(folder / VECTORS_NAME, mode="w+", dtype=np.float32, shape=(num_vectors, dim))
    for start in range(0, num_vectors, 50_000):
        rows = np.arange(start, min(start + 50_000, num_vectors))
        vectors[rows] = views_of(landmarks, rows // VIEWS_PER_LANDMARK, generator)
    vectors.flush()
    np.save(folder / IDS_NAME, np.arange(num_vectors))
    return VectorStore.open(folder), views_of(landmarks, generator.integers(0, len(landmarks), max(BATCHES)), generator)


def exact_lines(store: VectorStore, queries: ndarray) -> list[str]:
    """Ours in three precisions beside FAISS as it comes and with the threshold measured on this machine."""
    faiss = load_faiss(num_threads=1)
    flat = faiss.IndexFlatIP(store.dim)
    flat.add(np.ascontiguousarray(store.vectors))
    as_it_comes = int(faiss.cvar.distance_compute_blas_threshold)
    measured = set_blas_threshold()

    def with_threshold(threshold: int) -> Callable[[ndarray], object]:
        def search(batch: ndarray) -> object:
            faiss.cvar.distance_compute_blas_threshold = threshold
            return flat.search(batch, K)

        return search

    searchers = {precision: ExactSearcher(store, precision=precision) for precision in ("auto", "float32", "bfloat16")}
    ways: dict[str, Callable[[ndarray], object]] = {
        **{name: _searching(searcher, SearchParameters(k=K)) for name, searcher in searchers.items()},
        f"FAISS, threshold {as_it_comes:,} (its own)": with_threshold(as_it_comes),
        f"FAISS, threshold {measured:,} (measured)": with_threshold(measured),
    }
    for searcher in searchers.values():  # the norms are measured at the first search
        searcher.search(queries[:1], SearchParameters(k=K))
    table = {name: [milliseconds(search, queries[:size]) / size for size in BATCHES] for name, search in ways.items()}
    faiss.cvar.distance_compute_blas_threshold = measured
    expected = searchers["float32"].search(queries, SearchParameters(k=K))
    for name, searcher in searchers.items():
        hits = searcher.search(queries, SearchParameters(k=K))
        assert (hits.ids == expected.ids).all(), name
        assert (hits.scores == expected.scores).all(), name
    lines = ["## Exact search", "", f"| batch | auto takes | {' | '.join(table)} |", "|---" * (2 + len(table)) + "|"]
    for row, size in enumerate(BATCHES):
        values = " | ".join(f"{values[row]:.2f}" for values in table.values())
        lines.append(f"| {size} | {fastest_product(size, store.dim)} | {values} |")
    single, batched = table["auto"][0], table["auto"][BATCHES.index(32)]
    own = next(values for name, values in table.items() if "its own" in name)
    lines += ["", f"32 queries in a batch cost {batched / single:.3f} of 32 single ones, in float32 alone "]
    lines[-1] += f"{table['float32'][BATCHES.index(32)] / table['float32'][0]:.3f}; "
    lines[-1] += f"with FAISS as it comes {own[BATCHES.index(32)] / own[0]:.3f}."
    lines += ["All precisions gave the same ids and scores, to the last bit. Measured before the first search, in "]
    lines[-1] += f"microseconds per block of 4,096 and per query in it: {_costs(store.dim)}."
    return lines


def approximate_lines(store: VectorStore, queries: ndarray, types: list[IndexType]) -> list[str]:
    """Single queries and batches of 32 at some efforts, then single ones among some of the vectors."""
    exact = ExactSearcher(store)
    truth = exact.search(queries, SearchParameters(k=K)).ids
    lines = [
        "## Approximate search",
        "",
        f"| type | effort | recall at {K} | single | in batches of 32 |",
        "|---" * 5 + "|",
    ]
    filtered = ["", "## Among some of the vectors, drawn at random", ""]
    filtered += [f"| type | effort | survive | recall at {K} | single | exact, single |", "|---" * 6 + "|"]
    generator = np.random.default_rng(1)
    selections = {
        share: IdSelection.only(np.flatnonzero(generator.random(store.num_vectors) < share)) for share in FRACTIONS
    }
    for index_type in types:
        searcher = FaissSearcher(
            _filled(index_type, store), index_type, store, [MeasuredDepth(10, RecallCurve(), Effort())]
        )
        load_faiss(num_threads=1)
        efforts = _efforts(index_type)
        for effort in efforts:
            parameters = SearchParameters(k=K, effort=effort)
            search = _searching(searcher, parameters)
            single, batch = one_by_one(search, queries), milliseconds(search, queries[:32]) / 32
            recall = _recall(searcher.search(queries, parameters).ids, truth)
            lines.append(f"| {index_type.name} | {_name(effort)} | {recall:.4f} | {single:.3f} | {batch:.3f} |")
        for share, selection in selections.items():
            parameters = SearchParameters(k=K, effort=efforts[1], among=selection)
            own_truth = exact.search(queries[:NUM_SINGLE], parameters).ids
            singles = [searcher.search(queries[row : row + 1], parameters).ids for row in range(NUM_SINGLE)]
            recall = _recall(np.concatenate(singles), own_truth)
            cost, exact_cost = (one_by_one(_searching(s, parameters), queries) for s in (searcher, exact))
            values = f"{recall:.4f} | {cost:.3f} | {exact_cost:.3f}"
            filtered.append(f"| {index_type.name} | {_name(efforts[1])} | {share:.0%} | {values} |")
    return lines + filtered


def _filled(index_type: IndexType, store: VectorStore) -> Any:
    faiss = load_faiss(num_threads=os.cpu_count())
    index = create_untrained(index_type, store.dim, seed=0)
    vectors = np.ascontiguousarray(store.vectors)
    index.train(vectors[:: max(1, len(vectors) // (64 * max(index_type.num_partitions, 256)))])
    if index_type.family == "hnsw":
        index = faiss.IndexIDMap(index)
    index.add_with_ids(vectors, np.ascontiguousarray(store.ids))
    return index


def _efforts(index_type: IndexType) -> list[Effort]:
    if index_type.family == "hnsw":
        return [Effort(breadth=breadth) for breadth in (32, 64, 128)]
    candidates = 10 if index_type.codec == "RaBitQ" else 1
    return [Effort(num_probes=count, candidates_per_hit=candidates) for count in (4, 16, 64)]


def _searching(searcher: Any, parameters: SearchParameters) -> Callable[[ndarray], object]:
    return lambda batch: searcher.search(batch, parameters)


def _recall(found: ndarray, truth: ndarray) -> float:
    return float(np.mean([np.isin(wanted, row).mean() for row, wanted in zip(found, truth, strict=True)]))


def _name(effort: Effort) -> str:
    return f"{effort.num_probes} probes" if effort.num_probes else f"breadth {effort.breadth}"


def _costs(dim: int) -> str:
    costs = calibrated_costs(dim)
    return ", ".join(f"{name} {1e6 * fixed:.0f} + {1e6 * each:.1f}" for name, (fixed, each) in costs.items())


def one_by_one(search: Callable[[ndarray], object], queries: ndarray) -> float:
    """CPU milliseconds of one query, mean over `NUM_SINGLE`."""
    return (
        milliseconds(lambda batch: [search(batch[row : row + 1]) for row in range(len(batch))], queries[:NUM_SINGLE])
        / NUM_SINGLE
    )


def milliseconds(search: Callable[[ndarray], object], batch: ndarray) -> float:
    """CPU time of one call; the least of several rounds."""
    search(batch)
    rounds = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        search(batch)
        rounds.append(time.process_time() - started)
    return 1000 * min(rounds)


if __name__ == "__main__":
    main()
