"""What the metadata of 100 hits costs, out of a million rows.

    python benchmarks/metadata_lookup.py            # half a minute, prints a table
    python benchmarks/metadata_lookup.py --save     # and writes it to benchmarks/results/metadata_lookup_cpu.md

Three ways to the same rows of one memory-mapped Arrow file: an index's own, `take` on the whole table, and `take` on
each record batch. Memory is what the first 100 rows add to a fresh process: private pages, and pages of the file. The
latter are the system's cache, shared by all processes and given back when memory is short; for each page that is
touched, Linux maps the fifteen about it, too.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from frozen_backbone import footer
from numpy import ndarray

from indexing.building.store_writer import METADATA_ROWS_PER_BATCH
from indexing.metadata_table import MetadataTable

RESULT = Path(__file__).parent / "results" / "metadata_lookup_cpu.md"
ROWS_PER_LOOKUP = 100
NUM_LOOKUPS = 200
Lookup = Callable[[MetadataTable, ndarray], list[dict[str, Any]]]


def own(table: MetadataTable, rows: ndarray) -> list[dict[str, Any]]:
    return table.rows(rows)


def take_from_table(table: MetadataTable, rows: ndarray) -> list[dict[str, Any]]:
    return list(table.table.take(pa.array(rows)).to_pylist())


def take_from_batches(table: MetadataTable, rows: ndarray) -> list[dict[str, Any]]:
    batches, numbers = table.table.to_batches(), rows // METADATA_ROWS_PER_BATCH
    found: list[dict[str, Any]] = [{}] * len(rows)
    for number in np.unique(numbers).tolist():
        places = np.flatnonzero(numbers == number)
        part = batches[number].take(pa.array(rows[places] - number * METADATA_ROWS_PER_BATCH)).to_pylist()
        for place, row in zip(places.tolist(), part, strict=True):
            found[place] = row
    return found


WAYS: dict[str, Lookup] = {
    "an index's `metadata_of`": own,
    "`take` on each batch": take_from_batches,
    "`take` on the table": take_from_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    started = time.perf_counter()
    lines = [
        f"# The metadata of {ROWS_PER_LOOKUP} hits out of {arguments.rows:,}",
        "",
        "| way | CPU ms | private MiB | MiB of the file |",
        "|---|---|---|---|",
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        path = Path(folder) / "metadata.arrow"
        write_table(path, arguments.rows)
        for name in WAYS:
            milliseconds, private, mapped = pool.apply(measure, (name, path, arguments.rows))
            lines.append(f"| {name} | {milliseconds:.2f} | {private:.1f} | {mapped:.1f} |")
    lines += ["", *footer(time.perf_counter() - started, threads=1)]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_table(path: Path, num_rows: int) -> None:
    """The columns of an index of pictures, in the batches that a build writes."""
    kinds = {
        "key": pa.string(),
        "class_name": pa.string(),
        "label": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
    schema = pa.schema(kinds.items())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, num_rows, METADATA_ROWS_PER_BATCH):
            numbers = np.arange(start, min(start + METADATA_ROWS_PER_BATCH, num_rows))
            classes = [f"class{number % 5000:05d}" for number in numbers]
            columns = {
                "key": [f"train/{name}/{number}" for name, number in zip(classes, numbers, strict=True)],
                "class_name": classes,
                "label": numbers % 5000,
                "width": (numbers % 900).astype(np.int32),
                "height": (numbers % 700).astype(np.int32),
            }
            writer.write_table(pa.table(columns, schema=schema))


def measure(name: str, path: Path, num_rows: int) -> tuple[float, float, float]:
    """CPU milliseconds per lookup, and the MiB, private and of the file, that the first one adds."""
    lookup, generator = WAYS[name], np.random.default_rng(0)
    rows = [generator.integers(0, num_rows, ROWS_PER_LOOKUP) for _ in range(NUM_LOOKUPS)]
    before = resident_mib()
    table = MetadataTable(path)
    assert lookup(table, rows[0])[7]["key"].endswith(f"/{rows[0][7]}")
    private, mapped = (now - then for now, then in zip(resident_mib(), before, strict=True))
    started = time.process_time()
    for some in rows:
        lookup(table, some)
    return 1000 * (time.process_time() - started) / NUM_LOOKUPS, private, mapped


def resident_mib() -> tuple[float, float]:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    private, mapped = (int(status.split(f"{name}:")[1].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return private, mapped


if __name__ == "__main__":
    main()
