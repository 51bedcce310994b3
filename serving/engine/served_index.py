"""The living index with what belongs to its versions: the encoder that made the vectors, the shards of the pictures.

Another version serves only once its encoder was loaded and has given the stored vectors of its canaries; until then,
and where that fails, the version before goes on.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.shard_set import ShardSet
from indexing import versions
from indexing.living.journal import Journal
from indexing.living.live_index import LiveIndex
from indexing.living.live_view import LiveView
from indexing.published_index import PublishedIndex
from lookalike.artifacts import require_parent
from lookalike.errors import ArtifactError, LookalikeError
from serving.engine.canaries import require_same_vectors
from serving.engine.embedder import Embedder
from serving.engine.errors import UnknownVersionError

_SECONDS_BETWEEN_COMPLAINTS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Companions:
    """What serves together with one version."""

    encoder: Embedder | None
    shards: ShardSet | None


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """Everything that answers one request: it never changes, so ids, metadata and pictures fit together."""

    view: LiveView
    companions: Companions
    shown_by: "Served | None" = None  # what serves, where this is another version: its are the pictures that are shown

    @property
    def index_version(self) -> str:
        return self.view.base.version

    @property
    def encoder(self) -> Embedder | None:
        return self.companions.encoder

    @property
    def shards(self) -> ShardSet | None:
        return self.companions.shards

    @property
    def encoder_fingerprint(self) -> str | None:
        """Of what made the vectors; None where that is not known."""
        found = self.view.base.manifest.details.get("encoder_fingerprint")
        return None if found is None else str(found)


class ServedIndex:
    """Safe to use from many threads."""

    def __init__(
        self,
        folder: Path,
        *,
        shards_folder: Path | None = None,
        vectors_only: bool = False,
        load_encoder: Callable[[PublishedIndex], Embedder] | None = None,
    ) -> None:
        """Opens the current version, and embeds its canaries.

        Args:
            shards_folder: Where the pictures are; None: where they were when the index was built.
            vectors_only: Loads no encoder, and no torch.
            load_encoder: How, where not from the version itself.

        Raises:
            ArtifactError: index, encoder or shards are missing, damaged, or were not made for each other.
        """
        self.folder = folder
        self._shards_folder, self._vectors_only = shards_folder, vectors_only
        self._load_encoder = load_encoder or _encoder_of
        self._companions: weakref.WeakKeyDictionary[PublishedIndex, Companions] = weakref.WeakKeyDictionary()
        self._companions_lock = threading.Lock()
        self._next_complaint = 0.0
        self._dims: dict[str, int] = {}
        self.live = LiveIndex.open(folder, accept=self._accept)
        self._last = self.live.view()

    def now(self) -> Served:
        """What is durable at this moment; what it was, where the index on the disk cannot be served."""
        try:
            self._last = view = self.live.view()
        except LookalikeError as error:
            view = self._last
            if time.monotonic() >= self._next_complaint:
                self._next_complaint = time.monotonic() + _SECONDS_BETWEEN_COMPLAINTS
                logger.error("version %s goes on serving: %s", view.base.version, error)
        return self.serving(view)

    def serving(self, view: LiveView) -> Served:
        """A view of the live index with what belongs to its version."""
        with self._companions_lock:
            return Served(view, self._companions[view.base])

    def require_version(self, version: str) -> None:
        """Raises UnknownVersionError where the folder holds no such version."""
        known = versions.versions_of(self.folder)
        if version not in known:
            raise UnknownVersionError(f"there is no version {version}; there are {', '.join(known)}")

    def greatest_dim(self) -> int:
        """Of all versions that can be read; each manifest is read once."""
        dims = [self.live.dim]
        for version in versions.versions_of(self.folder):
            if version not in self._dims:
                try:
                    self._dims[version] = int(versions.details_of(self.folder, version)["dim"])
                except ArtifactError:
                    continue  # removed, or damaged: it cannot be searched
            dims.append(self._dims[version])
        return max(dims)

    def close(self) -> None:
        self.live.close()
        with self._companions_lock:
            for companions in self._companions.values():
                if companions.shards is not None:
                    companions.shards.close()

    def _accept(self, base: PublishedIndex) -> None:
        """Raises ArtifactError where a version cannot be served."""
        has_encoder = "encoder_fingerprint" in base.manifest.details and not self._vectors_only
        encoder = self._load_encoder(base) if has_encoder else None
        shards = self._shards_of(base)
        with self._companions_lock:
            encoder, shards = self._those_in_use(encoder, shards)
        if encoder is not None:
            started = time.perf_counter()
            num_canaries = self._check_canaries(base, encoder, shards)
            seconds = time.perf_counter() - started
            logger.info("index %s: %d canaries embedded again in %.1f s", base.folder, num_canaries, seconds)
        with self._companions_lock:  # another version may have been opened meanwhile
            self._companions[base] = Companions(*self._those_in_use(encoder, shards))

    def _those_in_use(
        self, encoder: Embedder | None, shards: ShardSet | None
    ) -> tuple[Embedder | None, ShardSet | None]:
        """Versions of one collection share one encoder: its weights are in memory once. The caller holds the lock."""
        for other in self._companions.values():
            if encoder is not None and other.encoder is not None and other.encoder.fingerprint == encoder.fingerprint:
                encoder = other.encoder
            if shards is not None and other.shards is not None and other.shards.fingerprint == shards.fingerprint:
                if other.shards is not shards:
                    shards.close()
                shards = other.shards
        return encoder, shards

    def _check_canaries(self, base: PublishedIndex, encoder: Embedder, shards: ShardSet | None) -> int:
        journal = Journal(self.folder)

        def picture_of(identifier: int) -> bytes | None:
            # As it was when the version was built; a replacement that is still to be taken in is no part of it.
            if "embeddings" not in base.manifest.parents:
                stored = journal.picture_of(identifier)
                if stored is not None:
                    return stored.content
            if shards is None or identifier >= shards.num_samples:
                return None
            return shards.read_bytes(identifier)

        try:
            return require_same_vectors(base, encoder, picture_of)
        finally:
            journal.close()

    def _shards_of(self, base: PublishedIndex) -> ShardSet | None:
        """The shards that a version was made from: the folder given, which must fit, or the remembered one."""
        folder = self._shards_folder
        if "shards" not in base.manifest.locations:
            if folder is not None:
                raise ArtifactError(f"{base.folder} was made of vectors, not from shards. Leave --shards out.")
            return None
        if folder is None and not base.shards_folder.is_dir():
            logger.warning("%s is gone: searching works, showing pictures does not. Give --shards.", base.shards_folder)
            return None
        folder = folder or base.shards_folder
        shards = ShardSet.open(folder)
        require_parent(base.folder, base.manifest, "shards", found=shards.fingerprint, parent=folder)
        return shards


def _encoder_of(base: PublishedIndex) -> Embedder:
    from serving.engine.picture_encoder import PictureEncoder

    return PictureEncoder(base)
