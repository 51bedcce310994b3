"""Exact revisited-Oxford evaluation with distractors: counting beside the usual full sort, in one run.

python benchmarks/r1m_evaluation.py                                  100,000 x 512, a minute
python benchmarks/r1m_evaluation.py --distractors 1001001 --dim 2048 the size of R1M; 4.1 GB of disk

Descriptors are synthetic (float16, on disk, memory-mapped); the ground truth has the size of Oxford's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lookalike.native_libraries import set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np
from numpy import ndarray
from peak_memory import PeakMemory

from evaluation.revisited.evaluate import evaluate_descriptors
from evaluation.revisited.ground_truth import GroundTruth, QueryLabels
from lookalike.artifacts import versions

NUM_QUERIES, NUM_DATABASE = 70, 4993
ROWS_AT_A_TIME = 50_000
Answer = TypeVar("Answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--distractors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--skip-sort", action="store_true", help="Only count.")
    arguments = parser.parse_args()
    truth, queries, database = make_benchmark(arguments.dim)
    with tempfile.TemporaryDirectory() as folder:
        distractors = make_distractors(Path(folder) / "d.npy", arguments.distractors, arguments.dim)
        with PeakMemory() as memory:
            result, cpu, wall = timed(lambda: evaluate_descriptors(queries, database, truth, distractors=[distractors]))
        file_mb = distractors.nbytes / 2**20
        print(f"{arguments.distractors:,} x {arguments.dim} float16 distractors, {file_mb:,.0f} MiB on disk")
        print(f"{'':<12} {'CPU s':>7} {'wall s':>7} {'mAP medium':>11} {'mAP hard':>9}")
        counted = result.sections["medium"].mean("map"), result.sections["hard"].mean("map")
        print(f"{'counting':<12} {cpu:7.2f} {wall:7.2f} {100 * counted[0]:11.5f} {100 * counted[1]:9.5f}")
        if not arguments.skip_sort:
            with PeakMemory() as sorting_memory:
                (medium, hard), cpu, wall = timed(lambda: sort_everything(queries, database, distractors, truth))
            print(f"{'sorting':<12} {cpu:7.2f} {wall:7.2f} {100 * medium:11.5f} {100 * hard:9.5f}")
            print(f"peak memory of sorting beyond the mapped file: {sorting_memory.mib:,.0f} MiB")
        print(f"peak memory of counting beyond the mapped file: {memory.mib:,.0f} MiB")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


def make_benchmark(dim: int) -> tuple[GroundTruth, ndarray, ndarray]:
    """Relevant pictures lean towards their query, so that positions are spread as in real results."""
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(NUM_QUERIES, dim))
    database = generator.normal(size=(NUM_DATABASE, dim))
    labels = []
    for query in queries:
        rows = generator.choice(NUM_DATABASE, 98, replace=False)
        database[rows[:79]] += generator.uniform(0.05, 0.4, (79, 1)) * query
        labels.append(QueryLabels(rows[:43], rows[43:79], rows[79:]))
    names = tuple(str(row) for row in range(NUM_DATABASE))
    truth = GroundTruth(names, tuple(map(str, range(NUM_QUERIES))), np.zeros((NUM_QUERIES, 4)), tuple(labels), "")
    return truth, unit(queries), unit(database)


def make_distractors(path: Path, count: int, dim: int) -> ndarray:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, dim))
    generator = np.random.default_rng(1)
    for start in range(0, count, ROWS_AT_A_TIME):
        rows = min(ROWS_AT_A_TIME, count - start)
        array[start : start + rows] = unit(generator.standard_normal((rows, dim), dtype=np.float32))
    array.flush()
    return np.load(path, mmap_mode="r")


def sort_everything(
    queries: ndarray, database: ndarray, distractors: ndarray, truth: GroundTruth
) -> tuple[float, float]:
    """The usual way: all similarities in memory, a full sort, the official definition per query."""
    blocks = [queries @ database.T]
    for start in range(0, len(distractors), ROWS_AT_A_TIME):
        blocks.append(queries @ np.asarray(distractors[start : start + ROWS_AT_A_TIME], np.float32).T)
    ranking = np.argsort(-np.concatenate(blocks, axis=1), axis=1, kind="stable")
    values: dict[str, list[float]] = {"medium": [], "hard": []}
    for row, labels in zip(ranking, truth.labels, strict=True):
        for setup in ("medium", "hard"):
            rows = labels.labelled()
            is_relevant = labels.is_relevant("medium" if setup == "medium" else "hard")
            kept = row[~np.isin(row, rows[~is_relevant])]
            positions = np.flatnonzero(np.isin(kept, rows[is_relevant]))
            found = np.arange(len(positions))
            before = np.divide(found, positions, out=np.ones(len(positions)), where=positions > 0)
            values[setup].append(float(((before + (found + 1) / (positions + 1)) / 2).mean()))
    return float(np.mean(values["medium"])), float(np.mean(values["hard"]))


def timed(work: Callable[[], Answer]) -> tuple[Answer, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def unit(rows: ndarray) -> ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
