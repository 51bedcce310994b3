"""What changes the gallery: additions, replacements, deletions, and other versions of it."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from indexing import versions
from indexing.living.journal import StoredPicture
from lookalike.errors import ArtifactError, ResourceError
from serving.engine.errors import (
    CompactionFailedError,
    IdTakenError,
    UnfitItemError,
    UnknownItemError,
    UnknownVersionError,
    VersionUnavailableError,
)
from serving.engine.pictures import NO_PICTURE, may_have_been_of_shards, size_of
from serving.engine.queries import IndexVersion, IndexVersions
from serving.engine.served_index import Served, ServedIndex
from serving.observability.metrics import ServingMetrics

logger = logging.getLogger(__name__)
_JSON_TYPES = (str, int, float, bool, list, dict, type(None))


class Changes:
    """Methods block; those that change versions work one after the other, in a thread of their own."""

    def __init__(self, index: ServedIndex, *, metrics: ServingMetrics | None = None) -> None:
        self._index, self._metrics = index, metrics
        self._swaps = ThreadPoolExecutor(1, thread_name_prefix="index versions")
        self._compactions = ThreadPoolExecutor(1, thread_name_prefix="index compaction")
        self._compaction: subprocess.Popen[str] | None = None
        self._compacted: Future[str] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends a compaction, which another one can go on with."""
        with self._lock:
            self._is_closed = True
            if self._compaction is not None:
                self._compaction.terminate()
        self._compactions.shutdown(cancel_futures=True)
        self._swaps.shutdown(cancel_futures=True)

    # Items

    def add(
        self,
        served: Served,
        vector: Float32[ndarray, "dim"],
        picture: bytes | None,
        metadata: Mapping[str, Any],
        id: int | None,
    ) -> tuple[Served, int]:
        """Returns the id and the index with it, whatever others change meanwhile; durable then.

        Args:
            served: What made the vector.
        """
        stored = _stored(served, picture, id)
        row = _with_size(served, dict(metadata), picture)
        try:
            [chosen], view = self._index.live.put(
                vector[None], [row], ids=None if id is None else [id], pictures=[stored], made_for=served.view
            )
        except ValueError as error:
            if id is not None and 0 <= id < 2**63 and self._holds(id):
                raise IdTakenError(f"id {id} is in use: delete or replace it, or choose another") from error
            raise UnfitItemError(str(error)) from error
        return self._index.serving(view), int(chosen)

    def replace(
        self,
        served: Served,
        id: int,
        vector: Float32[ndarray, "dim"],
        picture: bytes | None,
        metadata: Mapping[str, Any] | None,
    ) -> Served:
        """As `add`.

        Args:
            metadata: None: those it has.
        """
        stored = _stored(served, picture, id)

        def row_after(old: dict[str, Any]) -> dict[str, Any]:
            row = _as_json(old) if metadata is None else dict(metadata)
            if metadata is None and picture is not None:  # of another size
                row = {name: value for name, value in row.items() if name not in ("width", "height")}
            return _with_size(served, row, picture)

        try:
            _, view = self._index.live.put(
                vector[None], [row_after], ids=[id], pictures=[stored], replaces=True, made_for=served.view
            )
        except KeyError as error:
            raise UnknownItemError(f"there is no picture with id {id}") from error
        except ValueError as error:
            raise UnfitItemError(str(error)) from error
        return self._index.serving(view)

    def delete(self, id: int) -> None:
        """Durable when it returns."""
        try:
            self._index.live.delete([id])
        except (KeyError, ValueError) as error:
            raise UnknownItemError(f"there is no picture with id {id}") from error

    def _holds(self, id: int) -> bool:
        return bool(self._index.live.view().holds(np.array([id], np.int64))[0])

    # Versions

    def versions(self) -> IndexVersions:
        """Raises VersionUnavailableError where the folder does not tell which is current."""
        folder, journal, served = self._index.folder, self._index.live.journal, self._index.now()
        try:
            current = versions.current_version(folder)
        except ArtifactError as error:
            logger.error("the versions of the index cannot be told: %s", error)
            raise VersionUnavailableError(
                f"the index folder does not tell which version is to serve; searches go on with {served.index_version}"
            ) from error
        found = []
        for name in versions.versions_of(folder):
            try:
                details = versions.details_of(folder, name)
            except ArtifactError:
                continue  # removed, or damaged: it cannot be served
            encoder = details.get("encoder_fingerprint")
            absorbed = versions.absorbed_sequence(details)
            found.append(
                IndexVersion(
                    name,
                    is_current=name == current,
                    is_served=name == served.index_version,
                    index_type=details["type"],
                    num_vectors=details["num_vectors"],
                    dim=details["dim"],
                    encoder_fingerprint=None if encoder is None else str(encoder),
                    num_changes_since=journal.num_changes_after(absorbed),
                )
            )
        absorbed = versions.absorbed_sequence(served.view.base.manifest.details)
        return IndexVersions(current, served.index_version, journal.num_changes_after(absorbed), found)

    def swap(self, version: str) -> "Future[str]":
        """Checks a version, makes it current, and serves it."""
        return self._swaps.submit(self._counted, lambda: self._publish(version))

    def rollback(self) -> "Future[str]":
        """Swaps to the version before the current one."""
        return self._swaps.submit(self._counted, self._roll_back)

    def compact(self) -> "Future[str]":
        """Builds a version with all changes in a process of its own, then serves it.

        Raises:
            ResourceError: this server is at it already.
        """
        with self._lock:
            if self._compacted is not None and not self._compacted.done():
                raise ResourceError("a compaction is under way")
            self._compacted = self._compactions.submit(self._counted, self._compact)
            return self._compacted

    def _counted(self, work: Callable[[], str]) -> str:
        try:
            version = work()
        except ArtifactError:
            self._count(is_done=False)
            raise
        self._count(is_done=True)
        return version

    def _count(self, *, is_done: bool) -> None:
        if self._metrics is not None:
            self._metrics.count_swap(is_done=is_done)

    def _publish(self, version: str) -> str:
        self._index.require_version(version)
        self._index.live.publish(version)
        return version

    def _roll_back(self) -> str:
        try:
            version = versions.version_before(self._index.folder, versions.current_version(self._index.folder))
        except ArtifactError as error:
            raise UnknownVersionError(str(error)) from error
        return self._publish(version)

    def _compact(self) -> str:
        # Not in this process: its work would hold up answers, and its memory would stay.
        command = [sys.executable, "-m", "indexing", "compact", str(self._index.folder), "--json"]
        # From here on, whatever ends the process below is no reason to begin again.
        versions.require_no_compaction(self._index.folder)
        with self._lock:
            if self._is_closed:
                raise ResourceError("the server is stopping")
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self._compaction = process
        output, errors = process.communicate()
        with self._lock:
            self._compaction = None
        if process.returncode:
            lines = errors.strip().splitlines() or [f"it ended with code {process.returncode}"]
            raise CompactionFailedError(f"the compaction failed: {lines[-1]}")
        self._index.live.refresh()
        return str(json.loads(output)["current"])


def _stored(served: Served, picture: bytes | None, id: int | None) -> StoredPicture | None:
    if picture is not None:
        return StoredPicture(content=picture)
    return NO_PICTURE if id is not None and may_have_been_of_shards(served, id) else None


def _with_size(served: Served, row: dict[str, Any], picture: bytes | None) -> dict[str, Any]:
    """The row with the picture's size, where the index has columns for it and the row has none."""
    if picture is not None:
        names = served.view.base.metadata.schema.names
        for name, side in zip(("width", "height"), size_of(picture), strict=True):
            if name in names:
                row.setdefault(name, side)
    return row


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Dates and times as texts, which the journal takes."""

    def spelled(value: Any) -> Any:
        if isinstance(value, _JSON_TYPES):
            return value
        return value.isoformat() if hasattr(value, "isoformat") else str(value)

    return {name: spelled(value) for name, value in row.items()}
