"""A published index: a folder of immutable versions and `CURRENT`, the name of the live one."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.faiss_index import FaissSearcher
from lookalike.artifacts import Manifest, locate_parent, read_manifest, verify_files, write_text_atomically
from lookalike.encoder import Encoder, load_encoder
from lookalike.errors import ArtifactError, ManifestMismatch
from lookalike.records import SearchHits, SearchParameters

INDEX_KIND = "index"
INDEX_VERSION = 1
FAISS_NAME = "index.faiss"
METADATA_NAME = "metadata.arrow"
METADATA_COLUMNS = ["key", "class_name", "label", "split", "width", "height"]
_CURRENT_NAME = "CURRENT"
_VERSION_NAME = re.compile(r"v\d{4,}")


class PublishedIndex:
    """One version, opened for reading; safe to use from many threads."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder / version
        self.version = version
        self.manifest: Manifest = read_manifest(self.folder, kind=INDEX_KIND, newest_version=INDEX_VERSION)
        self._searcher = FaissSearcher.read(
            self.folder / FAISS_NAME,
            index_type=self.manifest.details["type"],
            default_num_probes=self.manifest.details["default_num_probes"],
        )
        try:
            self._metadata = pa.ipc.open_file(pa.memory_map(str(self.folder / METADATA_NAME))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"{self.folder / METADATA_NAME} cannot be read: {error}. Build the index again."
            ) from error

    @classmethod
    def open(cls, folder: Path, *, version: str | None = None) -> "PublishedIndex":
        """Opens `version`, or the current one.

        Raises:
            ArtifactError: there is no such index or version, or its files are damaged beyond reading.
        """
        return cls(folder, version or current_version(folder))

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def num_vectors(self) -> int:
        return self._searcher.num_vectors

    @property
    def dim(self) -> int:
        return self._searcher.dim

    @property
    def shards_folder(self) -> Path:
        return locate_parent(self.folder, self.manifest, "shards")

    @cached_property
    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids in ascending order."""
        return self._searcher.ids()

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `FaissSearcher.search`."""
        return self._searcher.search(queries, parameters)

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """The stored vectors of `ids`; KeyError for an id that is not in the index."""
        return self._searcher.vectors_of(ids)

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> list[dict[str, Any]]:
        """The metadata rows of `ids`; KeyError for an id outside the table."""
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self._metadata.num_rows):
            raise KeyError(int(ids.min()) if ids.min() < 0 else int(ids.max()))
        return list(self._metadata.take(pa.array(ids)).to_pylist())

    def load_encoder(self) -> Encoder:
        """The encoder that made the vectors; it travels inside the index.

        Raises:
            ManifestMismatch: the encoder in the folder, or this version's evaluation transform, is not the one that
                the vectors were made with.
        """
        encoder = load_encoder(self.folder / "encoder")
        details = self.manifest.details
        for name, expected, found in (
            ("encoder", details["encoder_fingerprint"], encoder.fingerprint),
            ("evaluation transform", details["transform_fingerprint"], encoder.settings.input.fingerprint),
        ):
            if found != expected:
                raise ManifestMismatch(
                    f"index {self.folder} was built with {name} {expected[:12]}, but here it is {found[:12]}. "
                    "Embed the pictures and build the index again."
                )
        return encoder

    def check(self) -> None:
        """Raises ChecksumMismatch if any file differs from the manifest."""
        verify_files(self.folder, self.manifest)


def current_version(folder: Path) -> str:
    try:
        return (folder / _CURRENT_NAME).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {_CURRENT_NAME} file" if folder.exists() else "it does not exist"
        raise ArtifactError(f"{folder} is not an index: {reason}. `lookalike index build` makes one.") from None


def require_index_folder(folder: Path) -> None:
    """Raises ArtifactError if `folder` holds anything but an index."""
    if folder.exists() and not (folder / _CURRENT_NAME).exists() and any(folder.iterdir()) and not versions_of(folder):
        raise ArtifactError(f"{folder} holds something other than an index. Choose another folder.")


def set_current_version(folder: Path, version: str) -> None:
    write_text_atomically(folder / _CURRENT_NAME, version + "\n")


def versions_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("v*") if _VERSION_NAME.fullmatch(path.name))


def next_version(folder: Path) -> str:
    return f"v{1 + max((int(name[1:]) for name in versions_of(folder)), default=0):04d}"
