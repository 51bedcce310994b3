"""Centroids and codecs, trained on a sample: the part of an index that all its partitions share."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.building.gpu import create_assigner
from indexing.building.staging import Staging, publishing_file
from indexing.index_files import write_faiss_index
from indexing.index_types import IndexType, create_untrained
from indexing.planning.held_out import held_out_rows
from indexing.vector_store import VectorStore
from lookalike.native_libraries import load_faiss
from lookalike.progress import track

TRAINED_NAME = "trained.faiss"
POINTS_PER_PARTITION = 64
KMEANS_ITERATIONS = 10
# Of the ranges or rotations of a codec; more change nothing.
_CODEC_POINTS = 32_768
_ROWS_PER_COPY = 8192
_SAMPLE_NAME = "sample.npy"
_CENTROIDS_NAME = "centroids.npz"


def write_trained_index(store: VectorStore, index_type: IndexType, staging: Staging, *, seed: int) -> None:
    """Writes an index that knows its centroids and codec but holds no vectors; goes on after the last iteration."""
    if (staging.folder / TRAINED_NAME).exists():
        return
    sample = _sample(store, index_type, staging.folder / _SAMPLE_NAME, seed=seed)
    index = create_untrained(index_type, store.dim, seed=seed)
    if index_type.family == "ivf":
        path = staging.folder / _CENTROIDS_NAME
        index.quantizer.add(train_centroids(sample, index_type.num_partitions, seed=seed, checkpoint=path))
    # Evenly spread, since the sample is in the order of ids, and ids may follow shards or classes.
    index.train(np.ascontiguousarray(sample[:: max(1, len(sample) // _CODEC_POINTS)]))
    with publishing_file(staging.folder / TRAINED_NAME) as path:
        write_faiss_index(index, path)


def train_centroids(
    sample: Float32[ndarray, "sample dim"], num_partitions: int, *, seed: int, checkpoint: Path | None = None
) -> Float32[ndarray, "partitions dim"]:
    """Spherical k-means; each iteration is kept in `checkpoint`, from which a rerun goes on to the same result.

    Source: Dhillon and Modha 2001, "Concept decompositions for large sparse text data using clustering".
    """
    faiss = load_faiss()
    dim = sample.shape[1]
    assigner = create_assigner(dim)
    done, centroids = _read_checkpoint(checkpoint)
    left = range(done, KMEANS_ITERATIONS)
    for iteration in track(left, total=len(left), description="training centroids", unit="iterations"):
        clustering = faiss.Clustering(dim, num_partitions)
        clustering.niter, clustering.spherical, clustering.seed = 1, True, seed
        # The sample has been drawn already, and too few points are the planner's business.
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, max(1, len(sample))
        if centroids is not None:
            faiss.copy_array_to_vector(centroids.ravel(), clustering.centroids)
        clustering.train(sample, assigner)
        centroids = faiss.vector_to_array(clustering.centroids).reshape(num_partitions, dim)
        if checkpoint is not None:
            with publishing_file(checkpoint) as path, path.open("wb") as file:
                np.savez(file, done=iteration + 1, centroids=centroids)
    assert centroids is not None
    return centroids


def training_points(index_type: IndexType) -> int:
    """The size of the sample, where there are as many vectors."""
    return max(_CODEC_POINTS, POINTS_PER_PARTITION * index_type.num_partitions)


def sample_rows(num_vectors: int, size: int, *, seed: int) -> Int64[ndarray, "sample"]:
    """Ascending."""
    return np.sort(np.random.default_rng(seed).choice(num_vectors, min(size, num_vectors), replace=False))


def _sample(store: VectorStore, index_type: IndexType, path: Path, *, seed: int) -> Float32[ndarray, "sample dim"]:
    """Vectors to train on, as a mapped file: at 64 for each of 4096 partitions they would fill half a gigabyte."""
    if not path.exists():
        rows = sample_rows(store.num_vectors, training_points(index_type), seed=seed)
        rows = np.setdiff1d(rows, held_out_rows(store.num_vectors, seed=seed))
        with publishing_file(path) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (len(rows), store.dim)}
            )
            for start in range(0, len(rows), _ROWS_PER_COPY):
                file.write(np.asarray(store.vectors[rows[start : start + _ROWS_PER_COPY]], "<f4").tobytes())
    sample: ndarray = np.load(path, mmap_mode="r")
    return sample


def _read_checkpoint(path: Path | None) -> tuple[int, Float32[ndarray, "partitions dim"] | None]:
    if path is None or not path.exists():
        return 0, None
    with np.load(path) as saved:
        return int(saved["done"]), saved["centroids"]


def load_trained_index(staging: Staging) -> Any:
    return load_faiss().read_index(str(staging.folder / TRAINED_NAME))
