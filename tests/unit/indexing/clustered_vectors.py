"""Small collections that look like embeddings: clusters on the unit sphere, with scattered 64-bit ids and metadata."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from indexing.sources.arrays import ArraySource


def clustered(num_vectors: int, dim: int = 16, seed: int = 0) -> tuple[ndarray, ndarray]:
    """Unit vectors about 20 centres, and ids in no order."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(20, dim))[generator.integers(0, 20, num_vectors)]
    vectors = (vectors + 0.3 * generator.normal(size=vectors.shape)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, generator.permutation(10 * num_vectors)[:num_vectors].astype(np.int64) + 2**40


def write_source(folder: Path, num_vectors: int, dim: int = 16, seed: int = 0) -> ArraySource:
    """The files of such a collection, as another program would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors, ids = clustered(num_vectors, dim, seed)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "ids.npy", ids)
    pq.write_table(metadata_for(ids), folder / "metadata.parquet")
    return open_source_files(folder)


def open_source_files(folder: Path) -> ArraySource:
    return ArraySource(folder / "vectors.npy", folder / "ids.npy", folder / "metadata.parquet")


def metadata_for(ids: ndarray) -> pa.Table:
    """Columns of every kind that can be told from the id."""
    return pa.table(
        {
            "key": pa.array([f"picture {identifier}" for identifier in ids.tolist()]),
            "class_name": pa.array([f"class {i % 7}" if i % 5 else None for i in ids.tolist()]).dictionary_encode(),
            "price": pa.array((ids % 100) / 4),
            "tags": pa.array([[str(i % 2), str(i % 3)] for i in ids.tolist()]),
        }
    )
