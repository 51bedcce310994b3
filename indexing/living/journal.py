"""Changes of an index, durable before they are acknowledged: a table of an SQLite database in the index folder.

What an index holds is its current version and, after it, the changes which that version has not absorbed, in the order
of their sequence numbers. One process writes at a time (SQLite's locks see to it), any number read meanwhile.
"""

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from lookalike.errors import ArtifactError, DamagedArtifact, ResourceError

JOURNAL_NAME = "changes.sqlite"
_FORMAT = 1
_MAX_ID = 2**63 - 1
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_NOT_USABLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
)
_SCHEMA = """
CREATE TABLE changes (
    sequence INTEGER PRIMARY KEY,
    id INTEGER NOT NULL,
    vector BLOB,  -- float32, little endian; NULL where the picture is deleted
    metadata TEXT,  -- a JSON object
    encoder TEXT  -- fingerprint of what made the vector, where it is known
);
CREATE TABLE pictures (id INTEGER PRIMARY KEY, content BLOB, address TEXT);
-- last_sequence: the highest number ever given. trimmed_through: changes up to it have left the journal.
-- next_id: above every id there ever was. compaction: `VERSION SEQUENCE`, where one has begun.
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO facts VALUES ('last_sequence', 0), ('trimmed_through', 0), ('next_id', 0);
"""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A picture added, replaced or deleted."""

    sequence: int
    id: int
    vector: Float32[ndarray, "dim"] | None  # None: deleted
    metadata: Mapping[str, Any]
    encoder: str | None  # fingerprint of what made the vector, where it is known


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture that came with an addition: its bytes, or where they are."""

    content: bytes | None = None
    address: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What to put under an id."""

    id: int
    vector: Float32[ndarray, "dim"]
    metadata: Mapping[str, Any]
    picture: StoredPicture | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ChangesRead:
    """Changes after some sequence number, read at one moment."""

    changes: Sequence[Change]
    last_sequence: int  # everything up to it is in `changes`, or was asked not to be
    trimmed_through: int  # changes up to it cannot be read any more


class Journal:
    """The journal of one index folder; it is created by the first change. Safe to use from many threads.

    The file must lie on a local disk: SQLite's write-ahead log needs shared memory. A process that is forked off must
    open a journal of its own.
    """

    def __init__(self, folder: Path, *, lock_seconds: float = 30.0) -> None:
        """
        Args:
            lock_seconds: How long a change waits while another process writes.
        """
        self.path = folder / JOURNAL_NAME
        self._lock_seconds = lock_seconds
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()

    def stamp(self) -> int:
        """Differs after anything was written, by any process; -1 where there is no journal. Microseconds."""
        with self._read_lock, self._explained():
            if not self._open_reader():
                return -1
            assert self._reader is not None
            return int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    def changes_after(self, sequence: int, *, through: int | None = None) -> ChangesRead:
        """Changes with numbers above `sequence` (and at most `through`), in their order."""
        with self._read_lock, self._explained():
            if not self._open_reader():
                return ChangesRead([], 0, 0)
            assert self._reader is not None
            self._reader.execute("BEGIN")
            try:
                return _read_changes(self._reader, sequence, through)
            finally:
                self._reader.execute("COMMIT")

    def trimmed_through(self) -> int:
        """Changes up to this number have left the journal; 0 where there is none."""
        rows = self._rows("SELECT value FROM facts WHERE name = 'trimmed_through'")
        return int(rows[0][0]) if rows else 0

    def num_changes_after(self, sequence: int) -> int:
        """Without looking at them: their numbers have no gaps. Microseconds."""
        facts = dict(self._rows("SELECT name, value FROM facts"))
        first_left = max(sequence, facts.get("trimmed_through", 0))
        return max(0, int(facts.get("last_sequence", 0)) - first_left)

    def makers_after(self, sequence: int) -> list[tuple[str | None, int]]:
        """Fingerprints of the encoders (None where not known) and dimensions of all vectors after a number."""
        return self._rows(
            "SELECT DISTINCT encoder, length(vector) / 4 FROM changes WHERE sequence > ? AND vector IS NOT NULL",
            sequence,
        )

    def picture_of(self, identifier: int) -> StoredPicture | None:
        """The picture that was stored with the addition of this id, if any."""
        rows = self._rows("SELECT content, address FROM pictures WHERE id = ?", identifier)
        return StoredPicture(*rows[0]) if rows else None

    def with_pictures(self, ids: Sequence[int]) -> set[int]:
        """Those of `ids` under which a picture is stored."""
        rows = self._rows("SELECT id FROM pictures WHERE id IN (SELECT value FROM json_each(?))", json.dumps(ids))
        return {int(row[0]) for row in rows}

    @contextmanager
    def writing(self) -> Iterator["JournalTransaction"]:
        """One transaction: when the block ends well, all of it is on the disk; otherwise none of it happened.

        Raises:
            ResourceError: another process kept the journal locked for too long, the disk is full or read-only.
            DamagedArtifact: the file is not what was written.
        """
        with self._write_lock, self._explained():
            if self._writer is None:
                self._create()
                self._writer = self._connect()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield JournalTransaction(self._writer)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    with suppress(sqlite3.Error):  # the error that led here is the one to tell
                        self._writer.execute("ROLLBACK")
                raise

    def close(self) -> None:
        for connection in (self._reader, self._writer):
            if connection is not None:
                connection.close()
        self._reader = self._writer = None

    def _rows(self, query: str, *arguments: int | str) -> list[Any]:
        """Of a query; none where there is no journal."""
        with self._read_lock, self._explained():
            if not self._open_reader():
                return []
            assert self._reader is not None
            return self._reader.execute(query, arguments).fetchall()

    def _open_reader(self) -> bool:
        """Whether there is a journal; connects to it the first time."""
        if self._reader is None and self.path.exists():
            self._reader = self._connect()
        return self._reader is not None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._lock_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            found = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if found > _FORMAT:
                raise ArtifactError(
                    f"{self.path} has format {found}, this version reads up to {_FORMAT}. Upgrade lookalike."
                )
            # Without it, the log is synced only when it is folded into the database.
            connection.execute("PRAGMA synchronous=FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self) -> None:
        """Makes an empty journal that is whole from the moment it has its name; one that exists stays."""
        if self.path.exists():
            return
        temporary = self.path.with_name(f".{JOURNAL_NAME}-{uuid.uuid4().hex[:8]}")
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
            with suppress(FileExistsError):
                # Unlike a rename, a link never replaces the journal that another process made meanwhile.
                self.path.hardlink_to(temporary)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors, in the project's terms."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is None:
                raise  # not SQLite's word, but a misuse of its module
            if code & 0xFF in _LOCKED:
                raise ResourceError(
                    f"{self.path} is locked: another process has been writing for {self._lock_seconds:g} s. Try again, "
                    "or end that process."
                ) from error
            if code & 0xFF in _NOT_USABLE:
                raise ResourceError(
                    f"{self.path} cannot be used: {error}. Check that its folder exists, may be written to, and has "
                    "room."
                ) from error
            raise DamagedArtifact(
                f"{self.path} is not a journal of changes, or is damaged: {error}. Put back a copy of it; without any, "
                "the index is what its versions hold."
            ) from error


class JournalTransaction:
    """What one transaction may do."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def fact(self, name: str) -> Any:
        row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_fact(self, name: str, value: int | str | None) -> None:
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def start_after(self, sequence: int, *, next_id: int) -> None:
        """Makes numbers begin above those that a version has absorbed, and new ids above its own.

        A journal that was taken away and begun anew would otherwise number its changes as if they were absorbed.
        """
        if self.fact("last_sequence") < sequence:
            self.set_fact("last_sequence", sequence)
            self.set_fact("trimmed_through", sequence)
        self.set_fact("next_id", max(next_id, self.fact("next_id")))

    def assign_ids(self, count: int) -> range:
        """Ids above every one there ever was.

        Raises:
            ResourceError: 64 bits are used up.
        """
        first = int(self.fact("next_id"))
        if first + count > _MAX_ID:
            raise ResourceError(
                f"the highest id is {first - 1}: there is none above it to assign. Choose ids yourself."
            )
        self.set_fact("next_id", first + count)
        return range(first, first + count)

    def put(self, entries: Sequence[Entry], *, encoder: str | None) -> list[Change]:
        """Adds each entry, or replaces what its id holds; a picture goes with the entry it came with.

        Returns what a reader will find.
        """
        changes = []
        for entry, sequence in zip(entries, self._next_sequences(len(entries)), strict=True):
            blob, text = entry.vector.astype("<f4").tobytes(), json.dumps(dict(entry.metadata))
            self._connection.execute(
                "INSERT INTO changes VALUES (?, ?, ?, ?, ?)", (sequence, entry.id, blob, text, encoder)
            )
            changes.append(Change(sequence, entry.id, _vector(blob), json.loads(text), encoder))
            self._forget_picture(entry.id)
            if entry.picture is not None:
                self._connection.execute(
                    "INSERT INTO pictures VALUES (?, ?, ?)", (entry.id, entry.picture.content, entry.picture.address)
                )
        self._keep_ids_below_next([entry.id for entry in entries])
        return changes

    def delete(self, ids: Sequence[int]) -> list[Change]:
        """Returns what a reader will find."""
        changes = []
        for identifier, sequence in zip(ids, self._next_sequences(len(ids)), strict=True):
            self._connection.execute("INSERT INTO changes VALUES (?, ?, NULL, NULL, NULL)", (sequence, identifier))
            changes.append(Change(sequence, identifier, None, {}, None))
            self._forget_picture(identifier)
        self._keep_ids_below_next(ids)
        return changes

    def trim(self, through: int) -> None:
        """Lets go of changes up to a number: every version that is left has absorbed them."""
        if through > self.fact("trimmed_through"):
            self._connection.execute("DELETE FROM changes WHERE sequence <= ?", (through,))
            self.set_fact("trimmed_through", through)

    def _next_sequences(self, count: int) -> range:
        last = int(self.fact("last_sequence"))
        self.set_fact("last_sequence", last + count)
        return range(last + 1, last + count + 1)

    def _forget_picture(self, identifier: int) -> None:
        self._connection.execute("DELETE FROM pictures WHERE id = ?", (identifier,))

    def _keep_ids_below_next(self, ids: Sequence[int]) -> None:
        self.set_fact("next_id", max([self.fact("next_id"), *(min(i + 1, _MAX_ID) for i in ids)]))


def _read_changes(connection: sqlite3.Connection, sequence: int, through: int | None) -> ChangesRead:
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    last = facts["last_sequence"] if through is None else min(through, facts["last_sequence"])
    rows = connection.execute(
        "SELECT sequence, id, vector, metadata, encoder FROM changes WHERE sequence > ? AND sequence <= ? "
        "ORDER BY sequence",
        (sequence, last),
    )
    changes = [
        Change(number, identifier, _vector(blob), json.loads(metadata) if metadata else {}, encoder)
        for number, identifier, blob, metadata, encoder in rows
    ]
    return ChangesRead(changes, last, facts["trimmed_through"])


def _vector(blob: bytes | None) -> Float32[ndarray, "dim"] | None:
    return None if blob is None else np.frombuffer(blob, "<f4").astype(np.float32, copy=False)
