"""A finished shard set: plain WebDataset tars beside a table of their samples, for random access by row."""

import os
import threading
from collections import OrderedDict
from dataclasses import replace
from io import BufferedReader
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np
import pyarrow
from jaxtyping import Int64
from numpy import ndarray
from pyarrow import compute, parquet

from data_pipelines.decode import DecodeLimits
from data_pipelines.settings import ShardCacheSettings
from data_pipelines.shard_cache import cache_of, fetch_tables
from lookalike.artifacts import MANIFEST_NAME, Manifest, read_manifest, verify_files
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError, ManifestMismatch

SHARD_SET_KIND = "shard set"
SHARD_SET_VERSION = 1
SAMPLES_NAME = "samples.parquet"
CLASSES_NAME = "classes.parquet"
QUARANTINE_NAME = "quarantine.parquet"

SAMPLES_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("key", pyarrow.string(), nullable=False),
        pyarrow.field("shard", pyarrow.string(), nullable=False),
        pyarrow.field("offset", pyarrow.int64(), nullable=False),  # of the picture's first byte in the tar
        pyarrow.field("size", pyarrow.int64(), nullable=False),  # bytes
        pyarrow.field("label", pyarrow.int64(), nullable=False),  # row of classes.parquet, -1 for none
        pyarrow.field("class_name", pyarrow.string()),
        pyarrow.field("coarse_label", pyarrow.string()),
        pyarrow.field("split", pyarrow.string(), nullable=False),
        pyarrow.field("extension", pyarrow.string(), nullable=False),
        pyarrow.field("width", pyarrow.int32(), nullable=False),  # pixels, of the upright picture
        pyarrow.field("height", pyarrow.int32(), nullable=False),
        pyarrow.field("sha256", pyarrow.string(), nullable=False),  # of the picture's bytes
    ]
)
QUARANTINE_SCHEMA = pyarrow.schema(
    [pyarrow.field(name, pyarrow.string(), nullable=False) for name in ("key", "path", "reason", "message")]
)
CLASSES_SCHEMA = pyarrow.schema([pyarrow.field("class_name", pyarrow.string(), nullable=False)])

_MAX_OPEN_SHARDS = 256


class ShardSet:
    """Never changes once opened; may be shared by threads, forked and pickled. Row number = sample id."""

    folder: Path
    manifest: Manifest
    fingerprint: str
    samples: pyarrow.Table  # see SAMPLES_SCHEMA
    class_names: list[str]  # by class index
    shard_names: list[str]  # in row order
    labels: Int64[ndarray, "samples"]  # class index, -1 for none

    def __init__(self, folder: Path, manifest: Manifest, samples: pyarrow.Table, class_names: list[str]) -> None:
        """Use `ShardSet.open`."""
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.samples = samples
        self.class_names = class_names
        shards = manifest.details["shards"]
        self.shard_names = sorted(shards, key=lambda name: shards[name]["first_row"])
        self.labels = samples["label"].to_numpy()
        self._offsets = samples["offset"].to_numpy()
        self._sizes = samples["size"].to_numpy()
        self._shards = samples["shard"].combine_chunks().dictionary_encode()
        self._cache = cache_of(folder, manifest)
        self._open_shards: OrderedDict[str, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, location: Path | str, *, cache: ShardCacheSettings | None = None) -> "ShardSet":
        """Reads the manifest and the sample table, no shard.

        Args:
            location: A folder, or an address that fsspec knows, such as `s3://bucket/shards`.
            cache: Where shards of an address are kept; not used for a folder.

        Raises:
            ArtifactError: there is no shard set, or of a newer format, or its table does not fit its manifest.
            DataError: something at the address cannot be fetched.
        """
        if isinstance(location, str) and "://" in location:
            if cache is None:
                raise ValueError(f"{location} needs a cache to be read through")
            folder = fetch_tables(location, cache, kind=SHARD_SET_KIND, newest_version=SHARD_SET_VERSION)
        else:
            folder = Path(location)
        manifest = read_manifest(folder, kind=SHARD_SET_KIND, newest_version=SHARD_SET_VERSION)
        try:
            samples = parquet.read_table(folder / SAMPLES_NAME)
            class_names = parquet.read_table(folder / CLASSES_NAME)["class_name"].to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ArtifactError(f"the tables of shard set {folder} cannot be read: {error}") from error
        if not samples.schema.equals(SAMPLES_SCHEMA):
            raise ArtifactError(
                f"{folder / SAMPLES_NAME} has other columns than format {SHARD_SET_VERSION} prescribes."
            )
        if samples.num_rows != manifest.details["num_samples"]:
            raise ChecksumMismatch(
                f"{folder / SAMPLES_NAME} has {samples.num_rows} rows, {MANIFEST_NAME} says "
                f"{manifest.details['num_samples']}. Make the shard set again."
            )
        return cls(folder, manifest, samples, class_names)

    @property
    def num_samples(self) -> int:
        return int(self.samples.num_rows)

    @property
    def splits(self) -> list[str]:
        return sorted(self.manifest.details["splits"])

    @property
    def decode_limits(self) -> DecodeLimits:
        """What its pictures were checked against: whoever decodes them allows the same."""
        return DecodeLimits.model_validate(self.manifest.settings["shards"]["limits"])

    def rows(self, split: str | None = None) -> Int64[ndarray, "rows"]:
        """Rows of one split, ascending; all rows where `split` is None.

        Raises:
            DataError: there is no such split.
        """
        if split is None:
            return np.arange(self.num_samples, dtype=np.int64)
        self._require_split(split)
        return np.flatnonzero(compute.equal(self.samples["split"], split).to_numpy()).astype(np.int64)

    def shards_of(self, split: str | None = None) -> list[str]:
        """Names of the shards of one split, in row order; of all shards where `split` is None."""
        if split is None:
            return list(self.shard_names)
        self._require_split(split)
        return [name for name in self.shard_names if self.manifest.details["shards"][name]["split"] == split]

    def rows_of_shard(self, shard_name: str) -> range:
        """The rows of a shard are contiguous, in the order of the tar."""
        try:
            details = self.manifest.details["shards"][shard_name]
        except KeyError:
            raise DataError(f"{self.folder} has no shard {shard_name!r}.") from None
        return range(details["first_row"], details["first_row"] + details["num_samples"])

    def key(self, row: SupportsIndex) -> str:
        return str(self.samples["key"][index(row)].as_py())

    def read_bytes(self, row: SupportsIndex) -> bytes:
        """The encoded picture of a row, by one positioned read.

        Raises:
            ArtifactError: the shard is missing or shorter than the sample table says.
            DataError: the shard cannot be fetched.
        """
        name = self._shards[index(row)].as_py()
        size, offset = int(self._sizes[row]), int(self._offsets[row])
        shard = self._open_shard(name)  # held until the read is over, or another thread could close it
        data = os.pread(shard.descriptor, size, offset)
        if len(data) != size:
            raise ChecksumMismatch(
                f"{self.folder / name} ends inside sample {self.key(row)}: it was cut. Make the shard set again."
            )
        return data

    def open_file(self, name: str) -> BufferedReader:
        """A file of the set, to read from its start; a shard that lies elsewhere is fetched.

        Raises:
            ChecksumMismatch: it is missing.
            DataError: it cannot be fetched.
        """
        return os.fdopen(self._open_descriptor(name), "rb")

    def check(self, *, full: bool = False) -> None:
        """Compares the files' names and sizes with the manifest, or with `full` every byte.

        Of a set that lies elsewhere only the tables: its shards are compared whenever they are fetched.

        Raises:
            ChecksumMismatch: a file is missing or differs; the message names it.
        """
        files = {
            name: entry
            for name, entry in self.manifest.files.items()
            if self._cache is None or name not in self.manifest.details["shards"]
        }
        if full:
            verify_files(self.folder, replace(self.manifest, files=files))
            return
        for name, entry in files.items():
            path = self.folder / name
            if not path.is_file():
                raise ChecksumMismatch(f"{path} is missing. Make the shard set again.")
            if path.stat().st_size != entry["bytes"]:
                raise ChecksumMismatch(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}.")

    def close(self) -> None:
        """Closes open shards; a later read opens them again."""
        with self._lock:
            self._open_shards.clear()

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder.absolute(), self.fingerprint)

    def _require_split(self, split: str) -> None:
        if split not in self.manifest.details["splits"]:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}.")

    def _open_shard(self, name: str) -> "_OpenShard":
        with self._lock:
            shard = self._open_shards.get(name)
            if shard is None:
                if self._cache is not None:
                    self._let_go_of_evicted_shards()
                if len(self._open_shards) >= _MAX_OPEN_SHARDS:
                    self._open_shards.popitem(last=False)
                shard = self._open_shards[name] = _OpenShard(self._open_descriptor(name))
            self._open_shards.move_to_end(name)
            return shard

    def _let_go_of_evicted_shards(self) -> None:
        """An open file that was removed from the cache would take up the disk for as long as it stays open."""
        for name in [name for name, shard in self._open_shards.items() if os.fstat(shard.descriptor).st_nlink == 0]:
            del self._open_shards[name]

    def _open_descriptor(self, name: str) -> int:
        if self._cache is not None and name in self.manifest.details["shards"]:
            return self._cache.open(name)
        try:
            return os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            raise ChecksumMismatch(f"{self.folder / name} is missing. Make the shard set again.") from None


class _OpenShard:
    """A file descriptor that closes itself once its last reader lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _reopen(folder: Path, fingerprint: str) -> ShardSet:
    shard_set = ShardSet.open(folder)
    if shard_set.fingerprint != fingerprint:
        raise ManifestMismatch(
            f"{folder} was replaced while it was in use: it was {fingerprint[:12]}, it is {shard_set.fingerprint[:12]}."
        )
    return shard_set
