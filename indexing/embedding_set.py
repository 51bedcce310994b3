"""An embedding set: one block of vectors and ids per shard, the ledger of skipped pictures, and the encoder used.

Vectors are plain `.npy`, ids plain Parquet, so that other programs can read them without us.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64
from numpy import ndarray

from lookalike.artifacts import Manifest, locate_parent, read_manifest, verify_files
from lookalike.errors import DamagedArtifact, DataError

EMBEDDING_SET_KIND = "embedding set"
EMBEDDING_SET_VERSION = 1
ENCODER_FOLDER = "encoder"
_BLOCKS_FOLDER = "blocks"
_SKIPPED_NAME = "skipped.parquet"
_SKIPPED_SCHEMA = pa.schema([("id", pa.int64()), ("key", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class SkippedPicture:
    """A picture that has no vector, and why."""

    id: int
    key: str
    reason: str


@dataclass(frozen=True)
class EmbeddingSet:
    """A published embedding set; vectors are memory-mapped and read when asked for."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "EmbeddingSet":
        return cls(folder, read_manifest(folder, kind=EMBEDDING_SET_KIND, newest_version=EMBEDDING_SET_VERSION))

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def dim(self) -> int:
        return int(self.manifest.details["dim"])

    @property
    def shards_folder(self) -> Path:
        return locate_parent(self.folder, self.manifest, "shards")

    @cached_property
    def ids(self) -> Int64[ndarray, "vectors"]:
        """Sample ids of all vectors, in the order of `vectors`."""
        blocks = [pq.read_table(block.with_suffix(".parquet"))["id"].to_numpy() for block in self._blocks]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)

    def vectors(self) -> Float32[ndarray, "vectors dim"]:
        """All vectors as float32 in memory: 4 * vectors * dim bytes."""
        blocks = [np.asarray(np.load(block, mmap_mode="r"), np.float32) for block in self._blocks]
        vectors = np.concatenate(blocks) if blocks else np.zeros((0, self.dim), np.float32)
        if not np.isfinite(vectors).all():
            row = int(np.argwhere(~np.isfinite(vectors).all(axis=1))[0, 0])
            raise DataError(f"{self.folder}: the vector of picture {self.ids[row]} holds NaN or infinity.")
        return vectors

    def blocks(self) -> Iterator[tuple[Path, ndarray, Int64[ndarray, "block"]]]:
        """Each block's file, vectors (memory-mapped, as they are stored) and ids, in order.

        Raises:
            DamagedArtifact: a block cannot be read.
        """
        for path in self._blocks:
            try:
                vectors = np.load(path, mmap_mode="r")
                ids = pq.read_table(path.with_suffix(".parquet"))["id"].to_numpy()
            except (OSError, ValueError, EOFError, pa.ArrowException) as error:
                raise DamagedArtifact(f"a block of {self.folder} cannot be read: {error}. Embed again.") from error
            yield path, vectors, ids

    @cached_property
    def skipped(self) -> list[SkippedPicture]:
        return [SkippedPicture(**row) for row in pq.read_table(self.folder / _SKIPPED_NAME).to_pylist()]

    def check(self) -> None:
        """Raises ChecksumMismatch if any file differs from the manifest."""
        verify_files(self.folder, self.manifest)

    @property
    def _blocks(self) -> list[Path]:
        return [self.folder / _BLOCKS_FOLDER / f"{name}.npy" for name in self.manifest.details["blocks"]]


def block_is_written(folder: Path, name: str) -> bool:
    return block_path(folder, name, "skipped.parquet").exists()


def block_path(folder: Path, name: str, suffix: str) -> Path:
    return folder / _BLOCKS_FOLDER / f"{name}.{suffix}"


def write_block(
    folder: Path,
    name: str,
    vectors: ndarray,
    ids: Int64[ndarray, "vectors"],
    keys: list[str],
    skipped: list[SkippedPicture],
) -> None:
    """Writes one block; its last file, the ledger, marks it as whole, so a killed process leaves no half block."""
    block_path(folder, name, "npy").parent.mkdir(parents=True, exist_ok=True)
    with _replacing(block_path(folder, name, "npy")) as path, path.open("wb") as file:
        np.save(file, vectors)
    with _replacing(block_path(folder, name, "parquet")) as path:
        pq.write_table(pa.table({"id": ids, "key": pa.array(keys, pa.string())}), path)
    with _replacing(block_path(folder, name, "skipped.parquet")) as path:
        pq.write_table(_skipped_table(skipped), path)


def gather_ledger(folder: Path, names: list[str]) -> int:
    """Joins the blocks' ledgers into one file, removes them, and returns the number of skipped pictures."""
    tables = [pq.read_table(block_path(folder, name, "skipped.parquet")) for name in names]
    ledger = pa.concat_tables([_skipped_table([]), *tables])
    pq.write_table(ledger, folder / _SKIPPED_NAME)
    for name in names:
        block_path(folder, name, "skipped.parquet").unlink()
    return int(ledger.num_rows)


def _skipped_table(skipped: list[SkippedPicture]) -> pa.Table:
    return pa.Table.from_pylist([{"id": s.id, "key": s.key, "reason": s.reason} for s in skipped], _SKIPPED_SCHEMA)


class _replacing:
    """Yields a path beside `target` and renames it to `target` when the block ends well."""

    def __init__(self, target: Path) -> None:
        self._target, self._temporary = target, target.with_name(f".{target.name}.writing")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._temporary.replace(self._target)
        else:
            self._temporary.unlink(missing_ok=True)
