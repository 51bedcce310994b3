"""A gallery whose metadata is hard to quote, and has cells that are missing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from indexing.sources.arrays import ArraySource

DIM, NUM_VECTORS, NUM_TWINS = 16, 260, 40

HOSTILE = [
    '"',
    "\\",
    "'",
    '" or id >= 0 or name == "',
    "a\\",
    "\n",
    "\t\r",
    "é",
    "\U0001f600",
    "%",
    "{x}",
    "",
    "\x01",
    "in",
]


@dataclass(frozen=True)
class Gallery:
    folder: Path
    vectors: ndarray
    ids: ndarray
    rows: list[dict[str, Any]]  # metadata, one per vector
    source: ArraySource

    @property
    def uri(self) -> str:
        return str(self.folder / "milvus.db")


def write_gallery(folder: Path) -> Gallery:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(NUM_VECTORS, DIM)).astype(np.float32)
    vectors[100 : 100 + NUM_TWINS] = vectors[100]  # more twins than a search fetches beyond k
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = generator.permutation(10 * NUM_VECTORS)[:NUM_VECTORS].astype(np.int64)
    ids[0] = 2**62 + 1  # needs all of its 64 bits
    rows = [
        {
            "key": f"picture{row}",
            "name": None if row % 9 == 0 else HOSTILE[row % len(HOSTILE)],
            "width": None if row % 5 == 0 else int(generator.integers(-3, 4)),
            "share": None if row % 6 == 0 else float(generator.choice([-1.5, 0.0, 0.1, 1e-300, 2.0])),
            "is old": None if row % 4 == 0 else bool(row % 3),
            "Vector": f"v{row % 3}",
        }
        for row in range(NUM_VECTORS)
    ]
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "ids.npy", ids)
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    source = ArraySource(folder / "vectors.npy", folder / "ids.npy", folder / "metadata.parquet")
    return Gallery(folder, vectors, ids, rows, source)
