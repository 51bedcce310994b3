"""IVF indexes of blocks of rows, built independently of one another, and merged into one on disk.

Source of the method: Johnson, Douze and Jégou 2019, arXiv:1702.08734, and the on-disk demonstration of FAISS.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.building.gpu import create_assigner
from indexing.building.staging import Staging, publishing_file, reserve
from indexing.building.training import load_trained_index
from indexing.building.verification import require_rows_under_their_ids
from indexing.index_files import FAISS_NAME, LISTS_NAME, write_faiss_index
from indexing.vector_store import VectorStore
from lookalike.native_libraries import load_faiss
from lookalike.progress import Progress, track
from lookalike.world import World

BYTES_PER_BLOCK = 128 << 20  # of float32 vectors
_MOST_ROWS_PER_BLOCK = 100_000
_FOLDER_NAME = "partitions"


def row_blocks(store: VectorStore) -> list[range]:
    """Rows of each independent part, whatever the number of processes."""
    size = max(1, min(_MOST_ROWS_PER_BLOCK, BYTES_PER_BLOCK // (4 * store.dim)))
    return [range(start, min(start + size, store.num_vectors)) for start in range(0, store.num_vectors, size)]


def ids_of(store: VectorStore, rows: range) -> Int64[ndarray, "rows"]:
    return store.ids[rows.start : rows.stop]


def write_partitions(store: VectorStore, staging: Staging, *, world: World = World()) -> None:
    """Writes this rank's share of the parts; those that are there already are left alone."""
    blocks = row_blocks(store)
    own = [number for number in range(world.rank, len(blocks), world.size) if not _path(staging, number).exists()]
    if not own:
        return
    (staging.folder / _FOLDER_NAME).mkdir(exist_ok=True)
    assigner = create_assigner(store.dim, device=world.local_rank)
    total = sum(len(blocks[number]) for number in own)
    with Progress(total, description="adding vectors", unit="vectors") as progress:
        for number in own:
            rows = blocks[number]
            vectors = np.ascontiguousarray(store.vectors[rows.start : rows.stop], np.float32)
            ids = np.ascontiguousarray(ids_of(store, rows))
            index = _filled(load_trained_index(staging), vectors, ids, assigner)
            with publishing_file(_path(staging, number)) as path:
                write_faiss_index(index, path)
            progress.advance(len(rows))


def merge_partitions(store: VectorStore, staging: Staging) -> None:
    """Joins all parts into one memory-mapped index, then removes them."""
    faiss = load_faiss()
    if not is_merged(staging):
        numbers = range(len(row_blocks(store)))
        parts = [faiss.read_index(str(_path(staging, number)), faiss.IO_FLAG_MMAP) for number in numbers]
        index = load_trained_index(staging)
        with publishing_file(staging.version_folder / LISTS_NAME) as path:
            lists = _merged_lists(index, [part.invlists for part in parts], path)
        index.replace_invlists(lists, True)
        lists.this.disown()  # the index owns them from here on
        index.ntotal = sum(part.ntotal for part in parts)
        assert index.ntotal == store.num_vectors
        # Relative, so that a version may be moved, and its bytes do not depend on where it was built.
        lists.filename = LISTS_NAME
        with publishing_file(staging.version_folder / FAISS_NAME) as path:
            write_faiss_index(index, path)
    shutil.rmtree(staging.folder / _FOLDER_NAME, ignore_errors=True)


def is_merged(staging: Staging) -> bool:
    return (staging.version_folder / FAISS_NAME).exists()


def _filled(index: Any, vectors: Float32[ndarray, "rows dim"], ids: Int64[ndarray, "rows"], assigner: Any) -> Any:
    """`index` with `vectors` added and checked."""
    faiss = load_faiss()
    if assigner.ntotal == 0:
        assigner.add(index.quantizer.reconstruct_n(0, index.nlist))
    _, nearest = assigner.search(vectors, 1)
    assigned = np.ascontiguousarray(nearest[:, 0])
    # faiss.contrib.ivf_tools.add_preassigned (faiss 1.15) frees temporary arrays before it has read them, which fills
    # an index with random ids. Here all three arrays have names, and live until the call is over.
    index.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(assigned))
    require_rows_under_their_ids(index, vectors, ids, assigned)
    return index


def _merged_lists(index: Any, parts: list[Any], path: Path) -> Any:
    """On-disk lists at `path` that hold the entries of all `parts`, in their order.

    faiss's own merge_from_multiple does the same, but prints to the standard output.
    """
    faiss = load_faiss()
    sizes = np.array([[part.list_size(number) for number in range(index.nlist)] for part in parts], np.int64)
    entry_bytes = index.code_size + np.dtype(np.int64).itemsize
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(path))
    places, offset = faiss.OnDiskOneListVector(), 0
    for size in sizes.sum(axis=0).tolist():
        place = faiss.OnDiskOneList()
        place.size = place.capacity = size
        place.offset = offset
        places.push_back(place)
        offset += size * entry_bytes
    lists.lists.swap(places)
    lists.totsize = offset
    reserve(path, offset)
    lists.do_mmap()
    for number in track(range(index.nlist), total=index.nlist, description="merging", unit="partitions"):
        start = 0
        for part, size in zip(parts, sizes[:, number].tolist(), strict=True):
            if size:
                lists.update_entries(number, start, size, part.get_ids(number), part.get_codes(number))
                start += size
    return lists


def _path(staging: Staging, number: int) -> Path:
    return staging.folder / _FOLDER_NAME / f"{number:06d}.faiss"
