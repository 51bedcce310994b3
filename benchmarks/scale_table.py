"""Memory, disk, build time and latency for galleries from 5,000 to a billion pictures: the table of docs/scale.md.

python benchmarks/scale_table.py              from the planner's cost model and its nominal machine, at once
python benchmarks/scale_table.py --measure    besides, exact search at the sizes that fit here, half a minute
python benchmarks/scale_table.py --save       and writes both to benchmarks/results/scale_table_cpu.md

All figures of the first table are estimates: counted bytes, and operations divided by a machine's rates.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from lookalike.native_libraries import load_torch, num_cores, set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np

from indexing.index_types import IndexType
from indexing.planning.calibration import MachineRates, nominal_rates
from indexing.planning.cost_model import SearchWork, build_seconds, memory_bytes, query_seconds
from indexing.searching.exact import ExactSearcher
from indexing.settings import IndexSettings
from indexing.vector_store import VectorStore
from lookalike.artifacts import versions
from lookalike.records import Effort, SearchParameters

RESULT = Path(__file__).parent / "results" / "scale_table_cpu.md"
K = 10
# Partitions are not equally full, and full ones are visited more often: measured 1.5 to 1.7 on clustered vectors.
IMBALANCE = 1.7
# One 4 KiB page of an NVMe disk, when its reads follow one another.
SECONDS_PER_DISK_READ = 1e-4
# A graph search compares some 20 vectors for each one that it keeps.
COMPARED_PER_KEPT = 20
NOMINAL_CORES = 2


@dataclass(frozen=True)
class Layout:
    """How a gallery could be held."""

    num_vectors: int
    type_name: str
    effort: Effort
    machines: int = 1
    cores: int = NOMINAL_CORES
    store_in_memory: bool = True  # of the store, what the system keeps of the mapped file; else it is read from disk

    @property
    def index_type(self) -> IndexType:
        return IndexType.parse(self.type_name)

    @property
    def vectors_per_machine(self) -> int:
        return -(-self.num_vectors // self.machines)


LAYOUTS = (
    Layout(5_000, "Flat", Effort()),
    Layout(100_000, "Flat", Effort()),
    Layout(1_000_000, "Flat", Effort()),
    Layout(1_000_000, "IVF4096,SQ8", Effort(num_probes=64, candidates_per_hit=4)),
    Layout(1_000_000, "HNSW32,SQ8", Effort(breadth=64, candidates_per_hit=4)),
    Layout(10_000_000, "IVF16384,SQ8", Effort(num_probes=64, candidates_per_hit=4), cores=16),
    Layout(
        100_000_000, "IVF65536,RaBitQ", Effort(num_probes=128, candidates_per_hit=10), cores=32, store_in_memory=False
    ),
    Layout(
        100_000_000,
        "IVF32768,SQ8",
        Effort(num_probes=64, candidates_per_hit=4),
        machines=4,
        cores=32,
        store_in_memory=False,
    ),
    Layout(
        1_000_000_000,
        "IVF65536,RaBitQ",
        Effort(num_probes=128, candidates_per_hit=10),
        machines=8,
        cores=32,
        store_in_memory=False,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--measure", action="store_true", help="Also time exact search on this machine.")
    parser.add_argument("--save", action="store_true", help="Do both, and keep the result.")
    arguments = parser.parse_args()
    lines = [f"Vectors of {arguments.dim} float32. Estimated:", "", *estimated(arguments.dim)]
    if arguments.measure or arguments.save:
        load_torch(num_threads=num_cores())
        lines += ["", f"Measured on {num_cores()} cores, vectors in memory:", "", *measured(arguments.dim), ""]
        lines.append(", ".join(f"{name} {version}" for name, version in versions().items()))
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(["# What galleries of every size take", "", *lines]) + "\n", encoding="utf-8")


def estimated(dim: int) -> list[str]:
    """Memory, disk and build time are those of each machine."""
    rates = nominal_rates(dim)
    return [
        "| pictures | machines x cores | type | probes | memory | disk | build | one query | queries/s and core |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
        *(row(layout, dim, rates) for layout in LAYOUTS),
    ]


def measured(dim: int) -> list[str]:
    lines = [f"| pictures | exact {K} nearest of one query | of each of 256 at once |", "|---:|---:|---:|"]
    for num_vectors in (5_000, 100_000):
        alone, in_batch = measure_exact(num_vectors, dim)
        lines.append(f"| {num_vectors:,} | {duration(alone)} | {duration(in_batch)} |")
    return lines


def row(layout: Layout, dim: int, rates: MachineRates) -> str:
    count, index_type = layout.vectors_per_machine, layout.index_type
    memory = memory_bytes(index_type, count, dim)
    store = count * (4 * dim + 8)
    codes = 0 if index_type.family == "flat" else memory
    seconds = build_seconds(index_type, count, dim, rates, IndexSettings())
    if index_type.family != "hnsw":  # a graph is linked by one thread
        seconds *= NOMINAL_CORES / layout.cores
    work = work_of(layout)
    alone = query_seconds(index_type, work, dim, rates, in_batches=False)
    in_batch = query_seconds(index_type, work, dim, rates, in_batches=True)
    if not layout.store_in_memory:
        alone += work.gathered * SECONDS_PER_DISK_READ
        in_batch += work.gathered * SECONDS_PER_DISK_READ
    cells = (
        f"{layout.num_vectors:,}",
        f"{layout.machines} x {layout.cores}",
        layout.type_name,
        str(layout.effort.num_probes or layout.effort.breadth or "all"),
        size(memory),
        size(store + codes),
        duration(seconds) if seconds else "none",
        duration(alone),
        f"{1 / in_batch / NOMINAL_CORES:,.0f}" if index_type.family == "flat" else f"{1 / in_batch:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def work_of(layout: Layout) -> SearchWork:
    """Of one query, on one machine."""
    index_type, effort, count = layout.index_type, layout.effort, layout.vectors_per_machine
    if index_type.family == "flat":
        return SearchWork(scanned=float(count), gathered=0.0)
    candidates = float(K * effort.candidates_per_hit)
    if index_type.family == "hnsw":
        return SearchWork(scanned=0.0, gathered=COMPARED_PER_KEPT * (effort.breadth or K) + candidates)
    visited = count * (effort.num_probes or 1) / index_type.num_partitions
    return SearchWork(scanned=IMBALANCE * visited, gathered=candidates)


def measure_exact(num_vectors: int, dim: int) -> tuple[float, float]:
    """Seconds per query, alone and in a batch of 256: the least of five runs."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(num_vectors, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    searcher = ExactSearcher(VectorStore.of(vectors, np.arange(num_vectors)))
    queries, seconds = vectors[:256].copy(), {}
    for batch in (1, 256):
        searcher.search(queries[:batch], SearchParameters(k=K))
        runs = []
        for _ in range(5):
            started = time.perf_counter()
            searcher.search(queries[:batch], SearchParameters(k=K))
            runs.append((time.perf_counter() - started) / batch)
        seconds[batch] = min(runs)
    return seconds[1], seconds[256]


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds * 1e6:.0f} us"


if __name__ == "__main__":
    main()
