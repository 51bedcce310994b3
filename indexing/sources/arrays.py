"""Vectors that another program made: `.npy` or Parquet, with optional ids and metadata."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from numpy import ndarray
from pyarrow import compute

from indexing.sources.finite_blocks import finite_blocks, rows_per_block
from indexing.vector_source import VectorBlock
from lookalike.artifacts import file_sha256, fingerprint
from lookalike.errors import DamagedArtifact, DataError

ID_COLUMN = "id"
KEY_COLUMN = "key"
# What unit vectors may be off after they were computed in bfloat16, the coarsest format in use.
_NORM_TOLERANCE = 5e-3
_READ_BYTES = 1 << 20


class ArraySource:
    """A `VectorSource` over somebody else's files; row r of each belongs to vector r."""

    def __init__(
        self, vectors: Path, ids: Path | None = None, metadata: Path | None = None, *, normalize: bool = False
    ) -> None:
        """Reads all but the vectors.

        Args:
            vectors: `.npy` with a vector per row, or Parquet with one column of lists.
            ids: `.npy` of whole numbers, or Parquet with a column `id`. Where absent, the column `id` of `vectors`,
                or else the number of the row.
            metadata: Parquet, any columns; where absent, the other columns of `vectors`. Without a column `key`, the
                id is the key.
            normalize: Scale each vector to unit length; where false, vectors of other lengths are refused.

        Raises:
            DataError: a file cannot be read, or holds something else than it should.
        """
        self._files = {
            name: path
            for name, path in (("vectors", vectors), ("ids", ids), ("metadata", metadata))
            if path is not None
        }
        self._path, self._normalize = vectors, normalize
        self._rows = _ParquetRows.open(vectors) if _is_parquet(vectors) else _NpyRows.open(vectors)
        if self.num_vectors == 0 or self.dim == 0:
            raise DataError(f"{vectors} holds {self.num_vectors} vectors of {self.dim} numbers.")
        others = self._rows.other_columns if isinstance(self._rows, _ParquetRows) else []
        ids = ids or (vectors if ID_COLUMN in others else None)
        self._known_ids = None if ids is None else self._read_ids(ids)
        columns = None if metadata else [name for name in others if name != ID_COLUMN]
        self._metadata = self._read_metadata(metadata or vectors, columns) if metadata or columns else None
        self._when_opened = _states(self._files)

    @property
    def num_vectors(self) -> int:
        return self._rows.num_rows

    @property
    def dim(self) -> int:
        return self._rows.dim

    @property
    def fingerprint(self) -> str:
        return fingerprint({"parents": dict(self.parents), "normalize": self._normalize})

    @cached_property
    def parents(self) -> Mapping[str, str]:
        """SHA-256 of each file; reads all of them once."""
        return {name: file_sha256(path) for name, path in self._files.items()}

    @property
    def details(self) -> Mapping[str, Any]:
        return {}

    @property
    def encoder_folder(self) -> Path | None:
        return None

    @property
    def shards_folder(self) -> Path | None:
        return None

    def ids(self) -> Int64[ndarray, "vectors"]:
        return np.arange(self.num_vectors, dtype=np.int64) if self._known_ids is None else self._known_ids

    def blocks(self) -> Iterator[VectorBlock]:
        """In the order of the rows; at most 32 MiB each.

        Raises:
            DataError: a vector is not finite, zero, or not of unit length and `normalize` is false.
            DamagedArtifact: a file was changed meanwhile; told after the last block.
        """
        ids, start = self.ids(), 0
        for part in self._rows.parts():
            part_ids = ids[start : start + len(part)]
            for block in finite_blocks(part, part_ids, where=self._path, first_row=start):
                yield self._at_unit_length(block)
            start += len(part)
        self.check()

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> pa.Table:
        """Raises KeyError for an id that is not here."""
        if self._metadata is None:
            return pa.table({KEY_COLUMN: pa.array(ids).cast(pa.string())})
        table = self._metadata.take(pa.array(self._rows_of(ids)))
        if KEY_COLUMN not in table.column_names:
            table = table.add_column(0, KEY_COLUMN, pa.array(ids).cast(pa.string()))
        return table

    def check(self) -> None:
        """Raises DamagedArtifact where a file was changed since it was opened."""
        if _states(self._files) != self._when_opened:
            raise DamagedArtifact(f"{self._path} or a file beside it was changed while it was read. Start again.")

    def _read_ids(self, path: Path) -> Int64[ndarray, "vectors"]:
        ids = _parquet_ids(path) if _is_parquet(path) else _npy_ids(path)
        self._require_as_many(path, len(ids), "ids")
        if ids.min() < 0:
            raise DataError(f"{path} holds the id {int(ids.min())}; ids are not negative and below 2^63.")
        values, times = np.unique(ids, return_counts=True)
        if (times > 1).any():
            raise DataError(
                f"{path} holds {int((times > 1).sum())} ids more than once, such as {int(values[times > 1][0])}."
            )
        return ids

    def _read_metadata(self, path: Path, columns: list[str] | None) -> pa.Table:
        table = _read_parquet(path, columns)
        self._require_as_many(path, table.num_rows, "rows of metadata")
        if len(set(table.column_names)) < len(table.column_names):
            raise DataError(f"{path} has several columns of one name: {', '.join(table.column_names)}.")
        if KEY_COLUMN not in table.column_names:
            return table
        try:
            keys = table[KEY_COLUMN].cast(pa.string())
        except pa.ArrowException as error:
            raise DataError(f"{path}: the column {KEY_COLUMN} cannot be read as text: {error}.") from error
        return table.set_column(table.column_names.index(KEY_COLUMN), KEY_COLUMN, keys)

    @cached_property
    def _ascending(self) -> tuple[Int64[ndarray, "vectors"], Int64[ndarray, "vectors"]]:
        """Ids in ascending order, and their rows."""
        order = np.argsort(self.ids(), kind="stable")
        return self.ids()[order], order

    def _rows_of(self, ids: Int64[ndarray, "n"]) -> Int64[ndarray, "n"]:
        ascending, rows = self._ascending
        places = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
        is_here = ascending[places] == ids
        if not is_here.all():
            raise KeyError(int(ids[~is_here][0]))
        return rows[places]

    def _at_unit_length(self, block: VectorBlock) -> VectorBlock:
        vectors = np.asarray(block.vectors, np.float32)
        # In double precision: squares of large numbers overflow in single.
        norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
        if not norms.all():
            raise DataError(f"{self._path}: the vector with id {int(block.ids[np.argmin(norms)])} is zero.")
        if self._normalize:
            return VectorBlock((vectors / norms[:, None]).astype(np.float32), block.ids)
        deviations = np.abs(norms - 1)
        if deviations.max() > _NORM_TOLERANCE:
            raise DataError(
                f"{self._path}: vectors must have unit length, since the search ranks by inner product; found lengths "
                f"from {norms.min():.4g} to {norms.max():.4g}, e.g. of id {int(block.ids[deviations.argmax()])}. "
                "Ask for --normalize, or scale them."
            )
        return block

    def _require_as_many(self, path: Path, found: int, what: str) -> None:
        if found != self.num_vectors:
            raise DataError(f"{path} holds {found} {what}, but {self._path} holds {self.num_vectors} vectors.")


@dataclass(frozen=True)
class _NpyRows:
    array: ndarray

    @classmethod
    def open(cls, path: Path) -> "_NpyRows":
        array = _load_npy(path)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
            raise DataError(f"{path}: expected a vector of floats per row, found {array.dtype} of shape {array.shape}.")
        return cls(array)

    @property
    def num_rows(self) -> int:
        return len(self.array)

    @property
    def dim(self) -> int:
        return int(self.array.shape[1])

    def parts(self) -> Iterator[ndarray]:
        yield self.array


@dataclass(frozen=True)
class _ParquetRows:
    path: Path
    column: str
    dim: int
    num_rows: int
    other_columns: list[str]

    @classmethod
    def open(cls, path: Path) -> "_ParquetRows":
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}.") from error
        with file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            fitting = [field.name for field in schema if _is_vector(field.type)]
            if len(fitting) != 1:
                found = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise DataError(f"{path}: expected one column with a list of floats per row, found {found}.")
            [column] = fitting
            first = next(file.iter_batches(1, columns=[column]), None)
        dim = len(first.column(0)[0]) if first is not None and first.column(0)[0].is_valid else 0
        others = [field.name for field in schema if field.name != column]
        return cls(path, column, dim, num_rows, others)

    def parts(self) -> Iterator[ndarray]:
        start = 0
        # Buffered, or else a whole row group, which may be the whole file, would be read into memory.
        with pq.ParquetFile(self.path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(rows_per_block(self.dim), columns=[self.column]):
                column = batch.column(0)
                lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
                if column.null_count or column.flatten().null_count or (lengths != self.dim).any():
                    raise DataError(
                        f"{self.path}: the column {self.column} has gaps or lists of other lengths than {self.dim} "
                        f"between rows {start} and {start + len(column) - 1}."
                    )
                yield column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), self.dim)
                start += len(column)


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error


def _parquet_ids(path: Path) -> Int64[ndarray, "ids"]:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error
    if ID_COLUMN not in names:
        raise DataError(f"{path} has no column {ID_COLUMN}; it has {', '.join(names)}.")
    column = _read_parquet(path, [ID_COLUMN])[ID_COLUMN]  # alone: vectors may lie beside it
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{path}: the column {ID_COLUMN} must hold a whole number per row, found {column.type}.")
    return column.to_numpy().astype(np.int64)


def _npy_ids(path: Path) -> Int64[ndarray, "ids"]:
    ids = _load_npy(path)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{path}: expected one whole number per row, found {ids.dtype} of shape {ids.shape}.")
    return ids.astype(np.int64)


def _load_npy(path: Path) -> ndarray:
    try:
        array: ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}.") from error
    if not isinstance(array, ndarray):
        raise DataError(f"{path} holds several arrays; save one as .npy.")
    return array


def _states(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    states = {name: path.stat() for name, path in files.items()}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}
