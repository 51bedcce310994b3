"""A published index: a folder of immutable versions and `CURRENT`, the name of the live one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from indexing.index_files import read_faiss_index
from indexing.index_types import IndexType
from indexing.metadata_table import METADATA_NAME, MetadataTable
from indexing.searching.faiss_searcher import FaissSearcher
from indexing.searching.filtering import matching_rows
from indexing.searching.recall_curve import MeasuredDepth, measured_depths
from indexing.vector_store import VectorStore
from indexing.versions import current_version
from lookalike.artifacts import Manifest, locate_parent, read_manifest, verify_files
from lookalike.errors import ArtifactError, DamagedArtifact, ManifestMismatch
from lookalike.filters import Filter
from lookalike.id_selection import IdSelection
from lookalike.records import SearchHits, SearchParameters

if TYPE_CHECKING:
    import lookalike.encoder

INDEX_KIND = "index"
INDEX_VERSION = 2
ENCODER_FOLDER = "encoder"
# Selections of recent filters, of up to 8 bytes per vector each: people page through the answers to one filter.
_MOST_KEPT_SELECTIONS, _BYTES_OF_KEPT_SELECTIONS = 16, 256 << 20


class PublishedIndex:
    """One version, opened for reading: a `Searcher` with metadata. Safe to use from many threads."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder / version
        self.version = version
        self.manifest: Manifest = read_index_manifest(self.folder)
        details = self.manifest.details
        self.type = IndexType.parse(details["type"])
        self.store = _open_store(self.folder, self.manifest)
        self._searcher = open_searcher(
            self.folder,
            self.type,
            self.store,
            measured_depths(details),
        )
        self._metadata = MetadataTable(self.folder / METADATA_NAME)
        # Of a function, not of a method: who holds itself stays in memory, with the whole index, after a swap.
        fitting_in = _BYTES_OF_KEPT_SELECTIONS // (8 * max(self.num_vectors, 1))
        num_kept = max(1, min(_MOST_KEPT_SELECTIONS, fitting_in))
        self._selection_of = lru_cache(num_kept)(partial(_find_selection, self._metadata, self.store))
        # While pictures are deleted, each search of a live index comes with the same ids that it may find.
        self._selection_in_both = lru_cache(num_kept)(_selection_in_both)

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
        return self.store.num_vectors

    @property
    def dim(self) -> int:
        return self.store.dim

    @property
    def metadata(self) -> pa.Table:
        """Memory-mapped; row r describes `ids()[r]`."""
        return self._metadata.table

    @property
    def shards_folder(self) -> Path:
        """Where the pictures behind the vectors lie.

        Raises:
            ArtifactError: the index was built from vectors alone.
        """
        if "shards" not in self.manifest.locations:
            raise ArtifactError(f"index {self.folder} was built from vectors alone: it knows no pictures.")
        return locate_parent(self.folder, self.manifest, "shards")

    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids in ascending order."""
        return self.store.ids

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher.search`.

        Raises:
            ValueError: the queries cannot be compared with the vectors, or a filter names an unknown column.
        """
        if parameters.filter is not None:
            parameters = replace(
                parameters, filter=None, among=self.selection_of(parameters.filter, among=parameters.among)
            )
        return self._searcher.search(queries, parameters)

    def selection_of(self, condition: Filter, *, among: IdSelection | None = None) -> IdSelection:
        """The ids whose metadata fit `condition`; of those in `among`, where it is given.

        Raises:
            ValueError: the condition names an unknown column, or compares it with something of another type.
        """
        # By its spelling, too: for Python, a condition on 1 equals one on True.
        fitting = self._selection_of(condition, repr(condition))
        if among is None:
            return fitting
        return self._selection_in_both(fitting, among)

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """The stored vectors of `ids`; KeyError for an id that is not in the index."""
        return self.store.vectors_of(ids)

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> list[dict[str, Any]]:
        """The metadata rows of `ids`; KeyError for an id that is not in the index."""
        return self._metadata.rows(self.store.rows_of(ids))

    def load_encoder(self) -> "lookalike.encoder.Encoder":
        """The encoder that made the vectors; it travels inside the index.

        Raises:
            ArtifactError: the index was built from vectors alone.
            ManifestMismatch: the encoder in the folder, or this version's evaluation transform, is not the one that
                the vectors were made with.
        """
        return load_encoder_of(self.folder, self.manifest)

    def check(self) -> None:
        """Raises ChecksumMismatch if any file differs from the manifest."""
        verify_files(self.folder, self.manifest)


def open_searcher(
    folder: Path, index_type: IndexType, store: VectorStore, measured: Sequence[MeasuredDepth]
) -> FaissSearcher:
    """Search without metadata over the files of a version, published or not."""
    index = None if index_type.family == "flat" else read_faiss_index(folder)
    return FaissSearcher(index, index_type, store, measured)


def load_encoder_of(folder: Path, manifest: Manifest) -> "lookalike.encoder.Encoder":
    """See `PublishedIndex.load_encoder`; looks at no other file of the version in `folder`."""
    from lookalike.encoder import load_encoder  # brings torch, which searching by vector may do without

    details = manifest.details
    if "encoder_fingerprint" not in details:
        raise ArtifactError(f"index {folder} was built from vectors alone: it has no encoder for pictures.")
    encoder = load_encoder(folder / ENCODER_FOLDER)
    for name, expected, found in (
        ("encoder", details["encoder_fingerprint"], encoder.fingerprint),
        ("evaluation transform", details["transform_fingerprint"], encoder.settings.input.fingerprint),
    ):
        if found != expected:
            raise ManifestMismatch(
                f"index {folder} was built with {name} {expected[:12]}, but here it is {found[:12]}. "
                "Embed the pictures and build the index again."
            )
    return encoder


def read_index_manifest(folder: Path) -> Manifest:
    """Of the version in `folder`.

    Raises:
        ArtifactError: there is none, or none of this format.
    """
    manifest = read_manifest(folder, kind=INDEX_KIND, newest_version=INDEX_VERSION)
    if manifest.format_version < INDEX_VERSION:
        raise ArtifactError(
            f"{folder} has index format {manifest.format_version}, this version reads {INDEX_VERSION}. Build the index "
            "again; the embedding set stays usable."
        )
    return manifest


def _find_selection(metadata: MetadataTable, store: VectorStore, condition: Filter, spelling: str) -> IdSelection:
    fits: Bool[ndarray, vectors] = matching_rows(condition, metadata.table)
    return IdSelection.only(store.ids[fits])


def _selection_in_both(fitting: IdSelection, among: IdSelection) -> IdSelection:
    return IdSelection.only(fitting.ids[among.contains(fitting.ids)])


def _open_store(folder: Path, manifest: Manifest) -> VectorStore:
    try:
        store = VectorStore.open(folder)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedArtifact(f"the vectors in {folder} cannot be read: {error}. Build the index again.") from error
    found, expected = store.vectors.shape, (manifest.details["num_vectors"], manifest.details["dim"])
    if found != expected or len(store.ids) != expected[0]:
        raise DamagedArtifact(f"{folder} holds vectors of shape {found}, its manifest says {expected}. Build again.")
    return store
