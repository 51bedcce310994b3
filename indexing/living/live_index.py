"""An index that takes additions and deletions while it serves, and changes over to new versions."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from indexing import versions
from indexing.living.delta import metadata_table
from indexing.living.journal import Change, ChangesRead, Entry, Journal, JournalTransaction, StoredPicture
from indexing.living.live_view import LiveView
from indexing.published_index import PublishedIndex
from indexing.settings import IndexSettings
from lookalike.errors import ArtifactError, LookalikeError, ManifestMismatch, ResourceError
from lookalike.records import SearchHits, SearchParameters

Ids = Sequence[int | np.integer] | Int64[ndarray, "ids"]
Row = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]

logger = logging.getLogger(__name__)
_KEY_COLUMN = "key"
# Ids are signed 64-bit numbers, and there must be a next one.
_HIGHEST_ID = 2**63 - 2
# What unit vectors may be off after they were computed in bfloat16, the coarsest format in use.
_NORM_TOLERANCE = 5e-3
# Between reading CURRENT and opening that version, it may be replaced and removed; more often than this is no chance.
_TRIES = 10
# After a version that is current could not be opened.
_SECONDS_BETWEEN_TRIES = 30.0


class LiveIndex:
    """A `Searcher` over an index folder, safe to use from many threads, and beside other processes that do the same.

    Every search works on one `LiveView`, so that its answer is that of one moment. A change is durable when the call
    that made it returns, and in every search that begins after, in this process and, since each search looks at the
    journal (microseconds), in all others on the machine. When another version becomes current, it is opened in the
    background while searches go on. A process that is forked off must open a live index of its own.
    """

    def __init__(
        self, folder: Path, *, lock_seconds: float = 30.0, accept: Callable[[PublishedIndex], None] | None = None
    ) -> None:
        """Opens the current version and the changes after it.

        Args:
            lock_seconds: How long a change waits while another process writes.
            accept: Called with each version before it serves; raises ArtifactError where it must not.

        Raises:
            ArtifactError: there is no index, it is damaged, or its version does not go with its journal.
        """
        self.folder = folder
        self._accept = accept
        self.journal = Journal(folder, lock_seconds=lock_seconds)
        self._view_lock = threading.Lock()  # held for microseconds, or while changes of other processes are read
        self._swap_lock = threading.Lock()  # held while a version is opened to serve
        self._background = ThreadPoolExecutor(1, thread_name_prefix="index versions")
        self._compactions = ThreadPoolExecutor(1, thread_name_prefix="index compaction")
        self._current_seen, self._next_try = versions.stamp_of_current(folder), math.inf
        self._journal_taken_in = self.journal.stamp()  # before the first view, see `_catch_up`
        self._view = self._open_current()

    @classmethod
    def open(
        cls, folder: Path, *, lock_seconds: float = 30.0, accept: Callable[[PublishedIndex], None] | None = None
    ) -> "LiveIndex":
        return cls(folder, lock_seconds=lock_seconds, accept=accept)

    def close(self) -> None:
        """Waits for what runs in the background."""
        self._compactions.shutdown()
        self._background.shutdown()
        self.journal.close()

    # Reading

    def view(self) -> LiveView:
        """All that is durable at this moment; it stays as it is."""
        stamp = versions.stamp_of_current(self.folder)
        if stamp != self._current_seen or time.monotonic() >= self._next_try:
            self._current_seen, self._next_try = stamp, math.inf
            self._background.submit(self._change_over_or_log)
        with self._view_lock:
            return self._catch_up()

    @property
    def num_vectors(self) -> int:
        return self.view().num_vectors

    @property
    def dim(self) -> int:
        return self._view.dim

    @property
    def num_changes(self) -> int:
        """Changes after the current version: what a compaction would take in."""
        return self.journal.num_changes_after(versions.absorbed_sequence(self.view().base.manifest.details))

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher`."""
        return self.view().search(queries, parameters)

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """The stored vectors of `ids`; KeyError for an id that is not here."""
        return self.view().vectors_of(ids)

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> list[dict[str, Any]]:
        """One row per id, in their order; KeyError for an id that is not here."""
        return self.view().metadata_of(ids)

    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids, ascending."""
        return self.view().ids()

    # Changing

    def add(
        self,
        vectors: Float[ndarray, "n vector_dim"],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        ids: Ids | None = None,
        pictures: Sequence[StoredPicture | None] | None = None,
    ) -> Int64[ndarray, "n"]:
        """Adds pictures; when it returns, they are durable and the next search finds them.

        Args:
            vectors: Of unit length, by the encoder of the index.
            metadata: One row each: JSON values under the columns of the index. Where a row has no `key`, the id is it.
            ids: Not in use yet. Where absent, the next ones above all that there ever were.
            pictures: Kept beside the changes, see `Journal.picture_of`.

        Returns:
            Their ids.

        Raises:
            ValueError: vectors, ids or metadata do not fit; nothing was added.
            ResourceError: the journal is locked, or cannot be written; nothing was added.
        """
        return self.put(vectors, metadata, ids=ids, pictures=pictures)[0]

    def replace(
        self,
        ids: Ids,
        vectors: Float[ndarray, "n vector_dim"],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        pictures: Sequence[StoredPicture | None] | None = None,
    ) -> None:
        """Gives pictures that are here another vector and other metadata; as durable and visible as additions.

        Raises:
            KeyError: an id is not here; nothing was replaced.
            ValueError: vectors, ids or metadata do not fit; nothing was replaced.
            ResourceError: the journal is locked, or cannot be written; nothing was replaced.
        """
        self.put(vectors, metadata, ids=ids, pictures=pictures, replaces=True)

    def put(
        self,
        vectors: Float[ndarray, "n vector_dim"],
        metadata: Sequence[Row] | None = None,
        *,
        ids: Ids | None = None,
        pictures: Sequence[StoredPicture | None] | None = None,
        replaces: bool = False,
        made_for: LiveView | None = None,
    ) -> tuple[Int64[ndarray, "n"], LiveView]:
        """`add`, or `replace` where it `replaces`; raises as they do.

        Args:
            metadata: Instead of a row, what makes one of the row that is replaced, as it is then.
            made_for: The view whose encoder made the vectors; None: that is not checked.

        Returns:
            The ids, and the index with this change and none after it, whatever others do meanwhile.

        Raises:
            ResourceError: a version of another encoder than that of `made_for` is current; nothing was changed.
        """
        given = None if ids is None else _checked_ids(ids)
        with self._changing() as (transaction, view):
            if made_for is not None and _encoder_of(made_for) != _encoder_of(view):
                raise ResourceError(
                    f"version {view.base.version}, of another encoder, has replaced {made_for.base.version}, for "
                    "which the vectors were made. Make them anew, and try again."
                )
            chosen = given
            if chosen is None:
                chosen = np.array(transaction.assign_ids(len(vectors)), np.int64)
            elif replaces:
                view.require(chosen)
            elif taken := chosen[view.holds(chosen)].tolist():
                raise ValueError(f"id {taken[0]} is in use: replace what it holds, or choose another id")
            entries = _entries(view, chosen, vectors, metadata, pictures)
            changes = transaction.put(entries, encoder=_encoder_of(view))
        return chosen, self._take_in(view, changes)

    def delete(self, ids: Ids) -> None:
        """Takes pictures out; as durable as additions, and no search that begins after finds them.

        Raises:
            KeyError: an id is not here; nothing was deleted.
            ValueError: an id is given twice.
            ResourceError: the journal is locked, or cannot be written; nothing was deleted.
        """
        chosen = _checked_ids(ids)
        with self._changing() as (transaction, view):
            view.require(chosen)
            changes = transaction.delete([int(i) for i in chosen])
        self._take_in(view, changes)

    # Versions

    def refresh(self) -> None:
        """Changes over to the current version now, and returns when it serves.

        Raises:
            ArtifactError: it cannot be opened; the version before goes on serving.
        """
        with self._swap_lock:
            if versions.current_version(self.folder) != self._view.base.version:
                self._install(self._open_current())
        self.view()

    def publish(self, version: str) -> None:
        """Opens a version, makes it current, and changes over.

        Raises:
            ArtifactError: it cannot be opened or does not go with the journal; nothing has changed.
        """
        with self._swap_lock:
            view = self._open(version)
            versions.publish(self.folder, version)
            self._install(view)

    def open_version(self, version: str) -> LiveView:
        """What the index would hold at this moment if `version` were published; nothing is changed over.

        Raises:
            ArtifactError: there is no such version, or it could not be published.
        """
        versions.details_of(self.folder, version)
        return self._open(version)  # no swap waits for it

    def brought_up_to_date(self, view: LiveView) -> LiveView:
        """A view that `open_version` returned, and what the journal got since.

        Raises:
            ArtifactError: the version could not be published any more.
        """
        # Read before it is judged: then nothing of what is judged to be there can have left the journal before.
        read = self.journal.changes_after(view.sequence)
        details = view.base.manifest.details
        # Nothing but what is new can have made it unfit: searches wait for this, and the journal may be long.
        if read.trimmed_through > versions.absorbed_sequence(details) or not _fits(details, read.changes):
            versions.require_fit_for_changes(self.folder, details, version=view.base.version)
        return view.after(read)

    def rollback(self) -> str:
        """Publishes the version before the current one, and returns its name."""
        version = versions.version_before(self.folder, versions.current_version(self.folder))
        self.publish(version)
        return version

    def compact(self, settings: IndexSettings | None = None, *, keep_versions: int = 2) -> str:
        """See `compact_index`; searches and changes go on meanwhile. Returns the name of the version now current."""
        from indexing.living.compaction import compact_index  # brings torch, which searching may do without

        version = compact_index(self.folder, settings, keep_versions=keep_versions).version
        self.refresh()
        return version

    def compact_in_background(self, settings: IndexSettings | None = None, *, keep_versions: int = 2) -> "Future[str]":
        """As `compact`, at once returning what will hold its result."""
        return self._compactions.submit(self.compact, settings, keep_versions=keep_versions)

    @contextmanager
    def _changing(self) -> Iterator[tuple[JournalTransaction, LiveView]]:
        """A transaction, and what it changes; nobody else can change anything until it ends."""
        self._serve_current()  # now, because opening a version takes long, and others wait for the journal
        with self.journal.writing() as transaction:
            self._serve_current()
            with self._view_lock:
                view = self._catch_up()
            transaction.start_after(view.sequence, next_id=_id_after(view))
            yield transaction, view

    def _serve_current(self) -> None:
        if versions.current_version(self.folder) != self._view.base.version:
            self.refresh()

    def _take_in(self, view: LiveView, changes: Sequence[Change]) -> LiveView:
        """The view with the changes that were made to it; searches see them without reading the journal."""
        with self._view_lock:
            after = view.after(ChangesRead(changes, changes[-1].sequence if changes else view.sequence, 0))
            if self._view is view:
                self._view = after
            return after

    def _catch_up(self) -> LiveView:
        """Takes in what the journal got since; the caller holds the view's lock."""
        # Taken before reading: what is written in between only leads to one look too many.
        stamp = self.journal.stamp()
        if stamp != self._journal_taken_in:
            self._view = self._with_changes(self._view)
            self._journal_taken_in = stamp
        return self._view

    def _with_changes(self, view: LiveView) -> LiveView:
        """A view and what the journal got since; of a newer version, where it cannot be of this one."""
        read = self.journal.changes_after(view.sequence)
        if read.trimmed_through > view.sequence:
            # What this view lacks has been absorbed by a newer version, and is only there.
            return self._open_current()
        try:
            return view.after(read)
        except ManifestMismatch:
            # Made for a version of other vectors, to which this process has not yet changed over.
            if versions.current_version(self.folder) == view.base.version:
                raise
            return self._open_current()

    def _change_over_or_log(self) -> None:
        try:
            self.refresh()
        except Exception as error:
            # Whatever it was, searches go on with what there is.
            self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
            is_known = isinstance(error, LookalikeError)
            logger.error("the index stays at version %s: %s", self._view.base.version, error, exc_info=not is_known)

    def _install(self, view: LiveView) -> None:
        with self._view_lock:
            # What was written while the version was being opened; from here on, searches see both.
            stamp = self.journal.stamp()
            self._view = self._with_changes(view)
            self._journal_taken_in = stamp

    def _open_current(self) -> LiveView:
        for attempt in range(1, _TRIES + 1):
            version = versions.current_version(self.folder)
            try:
                return self._open(version)
            except ArtifactError:
                if attempt == _TRIES or versions.current_version(self.folder) == version:
                    raise
        raise AssertionError("unreachable")

    def _open(self, version: str) -> LiveView:
        view = LiveView.of(PublishedIndex.open(self.folder, version=version))
        versions.require_fit_for_changes(self.folder, view.base.manifest.details, version=version)
        if self._accept is not None:
            self._accept(view.base)
        return view.after(self.journal.changes_after(view.sequence))


def _id_after(view: LiveView) -> int:
    """The lowest id above all of the version's."""
    ids = view.base.store.ids
    return int(ids[-1]) + 1 if len(ids) else 0


def _fits(details: Mapping[str, Any], changes: Sequence[Change]) -> bool:
    """Whether these changes may come after a version, see `versions.require_fit_for_changes`."""
    dim, encoder = details["dim"], details.get("encoder_fingerprint")
    made = {(change.encoder, len(change.vector)) for change in changes if change.vector is not None}
    return all(length == dim and (not maker or not encoder or maker == encoder) for maker, length in made)


def _encoder_of(view: LiveView) -> str | None:
    fingerprint = view.base.manifest.details.get("encoder_fingerprint")
    return None if fingerprint is None else str(fingerprint)


def _checked_ids(ids: Ids) -> Int64[ndarray, "n"]:
    chosen = [int(i) for i in ids]
    for identifier in chosen:
        if not 0 <= identifier <= _HIGHEST_ID:
            raise ValueError(f"id {identifier} is not between 0 and {_HIGHEST_ID}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"id {max(chosen, key=chosen.count)} is given more than once")
    return np.array(chosen, np.int64)


def _entries(
    view: LiveView,
    ids: Int64[ndarray, "n"],
    vectors: ndarray,
    metadata: Sequence[Row] | None,
    pictures: Sequence[StoredPicture | None] | None,
) -> list[Entry]:
    """Raises ValueError for what does not fit the index."""
    given_rows: Sequence[Row] = [{}] * len(ids) if metadata is None else metadata
    kept = [None] * len(ids) if pictures is None else pictures
    if not len(ids) == len(vectors) == len(given_rows) == len(kept):
        raise ValueError(
            f"expected as many of each, got {len(ids)} ids, {len(vectors)} vectors, {len(given_rows)} metadata rows, "
            f"{len(kept)} pictures"
        )
    stored, rows = _stored_vectors(view, vectors), _completed_rows(view, ids, given_rows)
    return [Entry(int(i), v, m, p) for i, v, m, p in zip(ids, stored, rows, kept, strict=True)]


def _completed_rows(view: LiveView, ids: ndarray, rows: Sequence[Row]) -> list[dict[str, Any]]:
    schema = view.base.metadata.schema
    complete = [
        dict(row(view.metadata_of(ids[place : place + 1])[0]) if callable(row) else row)
        for place, row in enumerate(rows)
    ]
    if _KEY_COLUMN in schema.names:
        complete = [{_KEY_COLUMN: str(int(i)), **row} for i, row in zip(ids, complete, strict=True)]
    metadata_table(complete, schema)  # refuses what could not be searched later
    try:
        json.dumps(complete)  # the form in which they are kept
    except TypeError as error:
        raise ValueError(f"metadata must be JSON values: {error}") from None
    return complete


def _stored_vectors(view: LiveView, vectors: ndarray) -> Float32[ndarray, "n dim"]:
    """In the number format of the version, so that a compaction changes no score."""
    if vectors.ndim != 2 or vectors.shape[1] != view.dim:
        raise ValueError(f"vectors have shape {vectors.shape}, those of the index have length {view.dim}")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    is_unit = np.abs(lengths - 1) <= _NORM_TOLERANCE  # false for NaN, too
    if not is_unit.all():
        row = int(np.argmin(is_unit))
        raise ValueError(f"vectors must be finite and of unit length, that of row {row} has length {lengths[row]:.6g}")
    return vectors.astype(view.base.store.vectors.dtype).astype(np.float32)
