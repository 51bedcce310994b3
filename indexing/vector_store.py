"""The vectors of one version, memory-mapped, with their ids: exact search, exact scores and vectors by id."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

VECTORS_NAME = "vectors.npy"
IDS_NAME = "ids.npy"
# numpy reads headers with `ast.literal_eval`, which in CPython 3.11 now and then fails in two threads at once
# (python/cpython issue 106905); remove this once 3.12 is our minimum.
_header_lock = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class VectorStore:
    """Row r of `vectors` belongs to `ids[r]`; rows are in ascending order of ids."""

    vectors: ndarray  # [vectors, dim], float32 or float16
    ids: Int64[ndarray, "vectors"]

    @classmethod
    def open(cls, folder: Path) -> "VectorStore":
        with _header_lock:
            return cls(np.load(folder / VECTORS_NAME, mmap_mode="r"), np.load(folder / IDS_NAME, mmap_mode="r"))

    @classmethod
    def of(cls, vectors: ndarray, ids: Int64[ndarray, "vectors"]) -> "VectorStore":
        """From arrays in any order; copies them where they are not ascending."""
        if len(ids) > 1 and not (ids[1:] > ids[:-1]).all():
            order = np.argsort(ids, kind="stable")
            return cls(vectors[order], ids[order])
        return cls(vectors, ids)

    @property
    def num_vectors(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def rows_of(self, ids: Int64[ndarray, "n"]) -> Int64[ndarray, "n"]:
        """Raises KeyError for an id that is not here."""
        rows = np.searchsorted(self.ids, ids)
        is_here = (
            (rows < len(self.ids)) & (self.ids[np.minimum(rows, max(len(self.ids) - 1, 0))] == ids)
            if len(self.ids)
            else np.zeros(len(ids), bool)
        )
        if not is_here.all():
            raise KeyError(int(ids[~is_here][0]))
        return rows

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """Raises KeyError for an id that is not here."""
        return np.asarray(self.vectors[self.rows_of(ids)], np.float32)
