"""HNSW graphs: built row by row in one process, kept on disk every minute.

Source: Malkov and Yashunin 2016, arXiv:1603.09320.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from indexing.building.staging import Staging, publishing_file
from indexing.building.training import load_trained_index
from indexing.index_files import FAISS_NAME, write_faiss_index
from indexing.planning.held_out import held_out_of_graph
from indexing.vector_store import VectorStore
from lookalike.errors import DataError
from lookalike.native_libraries import load_faiss
from lookalike.progress import Progress

_CHECKPOINT_NAME = "graph.faiss"
ROWS_PER_BLOCK = 4096
SECONDS_BETWEEN_CHECKPOINTS = 60.0


def write_graph(store: VectorStore, staging: Staging, *, seed: int) -> None:
    """Adds all vectors under their ids; goes on from the last checkpoint to the very same graph.

    One thread, since links depend on the order in which vectors arrive, and threads race.
    """
    faiss = load_faiss()
    checkpoint, target = staging.folder / _CHECKPOINT_NAME, staging.version_folder / FAISS_NAME
    if target.exists():
        return
    index = faiss.read_index(str(checkpoint)) if checkpoint.exists() else _with_ids(load_trained_index(staging))
    graph = faiss.downcast_index(index.index)
    order, num_first = _order(store.num_vectors, seed=seed)
    done, written = int(index.ntotal), time.monotonic()
    with (
        _one_thread(faiss),
        Progress(store.num_vectors, description="linking vectors", unit="vectors", done=done) as progress,
    ):
        while done < store.num_vectors:
            stop = min(done + ROWS_PER_BLOCK, num_first if done < num_first else store.num_vectors)
            rows = order[done:stop]
            # The levels of new vectors are drawn at random, and faiss does not save the state of its generator.
            graph.hnsw.rng = faiss.RandomGenerator(seed + done)
            vectors = np.ascontiguousarray(store.vectors[rows], np.float32)
            index.add_with_ids(vectors, np.ascontiguousarray(store.ids[rows]))
            progress.advance(stop - done)
            done = stop
            if done == num_first:
                measured_folder(staging).mkdir(exist_ok=True)
                with publishing_file(measured_folder(staging) / FAISS_NAME) as path:
                    write_faiss_index(index, path)
            if done < store.num_vectors and time.monotonic() - written >= SECONDS_BETWEEN_CHECKPOINTS:
                with publishing_file(checkpoint) as path:
                    write_faiss_index(index, path)
                written = time.monotonic()
    _require_ids(index, store.ids[order])
    with publishing_file(target) as path:
        write_faiss_index(index, path)
    checkpoint.unlink(missing_ok=True)


def measured_folder(staging: Staging) -> Path:
    """Holds the graph as it was before it got the vectors that are held out: what its recall is measured on."""
    return staging.folder / "measured"


def _order(num_vectors: int, *, seed: int) -> tuple[Int64[ndarray, "vectors"], int]:
    """Rows in the order in which they are added, and how many come before those held out."""
    held_out = np.sort(held_out_of_graph(num_vectors, seed=seed))
    first = np.setdiff1d(np.arange(num_vectors), held_out)
    return np.concatenate([first, held_out]), len(first)


def _with_ids(index: Any) -> Any:
    return load_faiss().IndexIDMap(index)


def _require_ids(index: Any, ids: Int64[ndarray, "vectors"]) -> None:
    if not np.array_equal(load_faiss().vector_to_array(index.id_map), ids):
        raise DataError("faiss holds other ids than were added; nothing is built.")


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
