"""What deletions and additions cost a search, and what a change and a swap cost; the version itself beside it.

python benchmarks/live_index.py            # 100,000 x 512, some minutes
python benchmarks/live_index.py --save     # and writes it to benchmarks/results/live_index_cpu.md
python benchmarks/live_index.py --vectors 1000000 --type IVF4096,SQ8
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lookalike.native_libraries import set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np
from frozen_backbone import footer
from numpy import ndarray

from indexing.building.build import build_index
from indexing.living.live_index import LiveIndex
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from lookalike.native_libraries import load_faiss, load_torch
from lookalike.records import SearchParameters

RESULT = Path(__file__).parent / "results" / "live_index_cpu.md"
VIEWS_PER_LANDMARK = 20
NUM_QUERIES, K = 200, 100
REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--type", default="IVF1024,SQ8")
    parser.add_argument("--additions", type=int, default=5_000)
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.parent.name}/{RESULT.name} too")
    arguments = parser.parse_args()
    started = time.perf_counter()
    load_torch(num_threads=1)
    load_faiss(num_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), arguments.vectors, arguments.dim, arguments.type, arguments.additions)
    lines += ["", *footer(time.perf_counter() - started, threads=1)]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(folder: Path, num_vectors: int, dim: int, index_type: str, num_additions: int) -> list[str]:
    generator = np.random.default_rng(0)
    landmarks = generator.standard_normal((num_vectors // VIEWS_PER_LANDMARK, dim), dtype=np.float32)
    np.save(folder / "vectors.npy", views_of(landmarks, np.arange(num_vectors) // VIEWS_PER_LANDMARK, generator))
    queries = views_of(landmarks, generator.integers(0, len(landmarks), NUM_QUERIES), generator)
    additions = views_of(landmarks, generator.integers(0, len(landmarks), num_additions), generator)
    build_index(ArraySource(folder / "vectors.npy"), folder / "index", IndexSettings(type=index_type))
    live = LiveIndex.open(folder / "index")
    base, parameters = live.view().base, SearchParameters(k=K)

    def searching(search: Callable[..., object]) -> float:
        return milliseconds(lambda row: search(queries[row : row + 1], parameters), NUM_QUERIES)

    rows = [("the version itself, 1 query", searching(base.search)), ("live, no changes", searching(live.search))]
    live.delete(generator.choice(num_vectors, num_vectors // 100, replace=False))
    rows += [("live, 1% deleted", searching(live.search))]
    started = time.perf_counter()
    live.add(additions)
    seconds = time.perf_counter() - started
    rows += [(f"live, 1% deleted, {num_additions:,} added", searching(live.search))]
    rows += [("the version itself, again", searching(base.search))]
    rows += [("looking for changes (part of each search)", milliseconds(lambda _: live.view(), 2000))]
    one_by_one = milliseconds(lambda row: live.add(additions[row : row + 1]), 100, repetitions=1)
    lines = ["# Changes while it serves", ""]
    lines += [f"{num_vectors:,} x {dim}, {index_type}, k = {K}; one thread, least of {REPETITIONS}", ""]
    lines += ["| | CPU ms |", "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in rows)]
    lines += [f"| one addition, made durable | {one_by_one:.3f} |", ""]
    lines += [f"Adding {num_additions:,} in one call: {seconds:.2f} s of wall time."]
    started = time.perf_counter()
    live.compact()
    lines += [f"Compaction: {time.perf_counter() - started:.1f} s of wall time."]
    started = time.perf_counter()
    for version in ("v0001", "v0002") * 5:
        live.publish(version)
    lines += [f"One swap: {100 * (time.perf_counter() - started):.1f} ms of wall time, in which searches go on."]
    live.close()
    return lines


def views_of(landmarks: ndarray, numbers: ndarray, generator: np.random.Generator) -> ndarray:
    """Unit vectors around their landmarks."""
    noise = generator.standard_normal((len(numbers), landmarks.shape[1]), dtype=np.float32)
    vectors = landmarks[numbers] + np.float32(0.7) * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def milliseconds(work: Callable[[int], object], times: int, *, repetitions: int = REPETITIONS) -> float:
    """CPU time of one call; the least of several rounds."""
    rounds = []
    for _ in range(repetitions):
        started = time.process_time()
        for number in range(times):
            work(number)
        rounds.append(time.process_time() - started)
    return 1000 * min(rounds) / times


if __name__ == "__main__":
    main()
