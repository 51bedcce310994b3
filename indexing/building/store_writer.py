"""A source's vectors, ids and metadata as the memory-mapped files of a version, in ascending order of ids."""

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from indexing.building.staging import Staging, bytes_on_disk, full_disk_explained, publishing_file
from indexing.metadata_table import METADATA_NAME
from indexing.vector_source import VectorBlock, VectorSource
from indexing.vector_store import IDS_NAME, VECTORS_NAME
from lookalike.errors import DataError
from lookalike.progress import Progress

_PROGRESS_NAME = "store.json"
BYTES_BETWEEN_SYNCS = 256 << 20
METADATA_ROWS_PER_BATCH = 65_536
# What metadata takes on disk is known only afterwards.
_METADATA_BYTES_PER_ROW = 100


def write_store(source: VectorSource, staging: Staging) -> None:
    """Writes `vectors.npy`, `ids.npy` and `metadata.arrow`, each in bounded memory; goes on where it stopped.

    Raises:
        DataError: ids are negative or repeated, or blocks do not fit together.
        ResourceError: the disk has no room.
    """
    folder = staging.version_folder
    if all((folder / name).exists() for name in (VECTORS_NAME, IDS_NAME, METADATA_NAME)):
        return
    needed = source.num_vectors * (4 * source.dim + 8 + _METADATA_BYTES_PER_ROW) - bytes_on_disk(folder)
    with full_disk_explained(folder, max(needed, 0), purpose="a copy of the vectors"):
        ids = source.ids()
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        _require_usable(ascending, num_vectors=source.num_vectors)
        if not (folder / IDS_NAME).exists():
            with publishing_file(folder / IDS_NAME) as path, path.open("wb") as file:
                # As np.save, which would not say that the disk is full.
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ascending))
                file.write(ascending.data)
        if not (folder / METADATA_NAME).exists():
            with publishing_file(folder / METADATA_NAME) as path:
                _write_metadata(source, ascending, path)
        if not (folder / VECTORS_NAME).exists():
            rows = np.empty_like(order)
            rows[order] = np.arange(len(order))  # of each id in the source's order
            _write_vectors(source, ids, rows, staging)


def _write_vectors(
    source: VectorSource, ids: Int64[ndarray, "vectors"], rows: Int64[ndarray, "vectors"], staging: Staging
) -> None:
    """Writes vector n of the source, which has id `ids[n]`, to row `rows[n]`."""
    path = staging.version_folder / VECTORS_NAME
    partial = path.with_name(f"{path.name}.partial")
    state = staging.read(_PROGRESS_NAME) if partial.exists() else None
    done, dtype = (state["vectors"], np.dtype(state["dtype"])) if state else (0, None)
    unsynced = 0
    with (
        _opened(partial) as file,
        Progress(source.num_vectors, description="copying vectors", unit="vectors", done=done) as progress,
    ):
        for block in _blocks_after(source, done):
            if dtype is None:
                dtype = np.dtype(np.float16 if block.vectors.dtype == np.float16 else np.float32)
                _reserve(file, (source.num_vectors, source.dim), dtype)
            part = slice(done, done + len(block.ids))
            _require_fitting(block, dim=source.dim, dtype=dtype, ids=ids[part])
            _write_rows(file, np.ascontiguousarray(block.vectors, dtype), rows[part])
            done, unsynced = part.stop, unsynced + block.vectors.nbytes
            progress.advance(len(block.ids))
            if unsynced >= BYTES_BETWEEN_SYNCS:
                os.fsync(file.fileno())
                staging.write(_PROGRESS_NAME, {"vectors": done, "dtype": dtype.name})
                unsynced = 0
        os.fsync(file.fileno())
    if done != source.num_vectors:
        raise DataError(f"the source promised {source.num_vectors} vectors, but brought {done}.")
    partial.replace(path)


def _blocks_after(source: VectorSource, done: int) -> Iterator[VectorBlock]:
    """The blocks without the first `done` vectors, wherever a block ends."""
    for block in source.blocks():
        skipped = min(done, len(block.ids))
        done -= skipped
        if skipped < len(block.ids):
            yield VectorBlock(block.vectors[skipped:], block.ids[skipped:])


def _opened(path: Path) -> FileIO:
    # Plain writes, not a memory map: a full disk is then an error, not a bus error that kills the process.
    path.touch()
    return path.open("r+b", buffering=0)


def _reserve(file: FileIO, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    file.truncate(0)
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if num_bytes:
        os.posix_fallocate(file.fileno(), file.tell(), num_bytes)


def _write_rows(file: FileIO, vectors: ndarray, rows: Int64[ndarray, "vectors"]) -> None:
    """Writes `vectors` to their rows of the array, neighbours at once."""
    header = _header_bytes(file)
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    if not (order[1:] > order[:-1]).all():
        vectors = vectors[order]
    ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, len(rows))
    start = 0
    for end in ends:
        data = memoryview(vectors[start:end].data).cast("B")
        offset = header + int(rows[start]) * vectors.strides[0]
        while data:  # Linux writes at most 2 GiB at once
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written
        start = end


def _header_bytes(file: FileIO) -> int:
    file.seek(0)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


def _write_metadata(source: VectorSource, ascending: Int64[ndarray, "vectors"], path: Path) -> None:
    """In batches, so that neither writing nor reading a row needs the whole table in memory."""
    schema = _plain_schema(source.metadata_of(ascending[:0]).schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(ascending), METADATA_ROWS_PER_BATCH):
            part = source.metadata_of(ascending[start : start + METADATA_ROWS_PER_BATCH])
            table = part.cast(schema).combine_chunks()
            writer.write_table(table)


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """Without dictionaries, which the file format cannot replace from batch to batch, and without pandas' notes."""
    return pa.schema(
        [
            pa.field(field.name, field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
            for field in schema
        ]
    )


def _require_usable(ascending: Int64[ndarray, "ids"], *, num_vectors: int) -> None:
    if len(ascending) != num_vectors:
        raise DataError(f"the source has {num_vectors} vectors, but {len(ascending)} ids.")
    if len(ascending) == 0:
        raise DataError("the source holds no vectors: there is nothing to build an index of.")
    if ascending[0] < 0:
        raise DataError(f"ids must not be negative, found {ascending[0]}.")
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise DataError(f"ids must be unique, found {repeated[0]} more than once.")


def _require_fitting(block: VectorBlock, *, dim: int, dtype: np.dtype[Any], ids: Int64[ndarray, "vectors"]) -> None:
    if block.vectors.shape != (len(block.ids), dim):
        raise DataError(f"the source brought a block of shape {block.vectors.shape}, but vectors have length {dim}.")
    if dtype == np.float16 and block.vectors.dtype != dtype:
        raise DataError(f"the source brought {block.vectors.dtype} after float16: its blocks must be of one kind.")
    if not np.array_equal(block.ids, ids):
        raise DataError("the source brought vectors under other ids than it listed.")
