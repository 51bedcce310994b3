"""A new version from the current one and the changes after it.

It may be killed at any point and run again: a version is whole or absent, it says up to which number it holds the
changes, and the journal lets go of a change only when every version that is left holds it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from indexing.building.build import build_index
from indexing.living.delta import Delta, is_among
from indexing.living.journal import Change, Journal
from indexing.published_index import ENCODER_FOLDER, PublishedIndex
from indexing.settings import IndexSettings
from indexing.vector_source import VectorBlock
from indexing.versions import absorbed_sequence, compacting, current_version, remove_old_versions
from lookalike.artifacts import fingerprint
from lookalike.errors import DataError
from lookalike.settings import validate_settings

_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Compaction:
    """What one came to."""

    version: str  # current now
    num_changes: int  # taken in
    removed: Sequence[str]  # versions


def compact_index(folder: Path, settings: IndexSettings | None = None, *, keep_versions: int = 2) -> Compaction:
    """Builds and publishes a version that holds the changes made so far, and removes old versions.

    Searches and further changes go on meanwhile, in this process and in others. Without changes, nothing is built.

    Args:
        settings: Of the new version; where absent, those of the current one.
        keep_versions: How many are left; more allow to go further back, and keep changes in the journal for longer.

    Raises:
        ResourceError: another process is compacting or building in this folder.
        DataError: everything was deleted, so that there is nothing to build from.
    """
    current_version(folder)  # or a lock would be left in a folder that is no index
    with compacting(folder), closing(Journal(folder)) as journal:
        base = PublishedIndex.open(folder)
        absorbed = absorbed_sequence(base.manifest.details)
        through = _goal(journal, folder, base.version, absorbed)
        changes = journal.changes_after(absorbed, through=through).changes
        version = base.version
        if changes:
            source = CompactedSource(base, changes)
            if not source.num_vectors:
                raise DataError(f"{folder}: all vectors were deleted; there is nothing to build a version from.")
            chosen = settings or validate_settings(
                IndexSettings, dict(base.manifest.settings), where=f"manifest of {base.folder}"
            )
            # A plan that no longer keeps every wish is better than changes that pile up.
            version = build_index(source, folder, chosen, accepts_nearest=True).version
        removed = remove_old_versions(folder, keep=keep_versions)
        return Compaction(version, len(changes), removed)


class CompactedSource:
    """A `VectorSource` over a version without what was deleted, with what was added; in ascending order of ids."""

    def __init__(self, base: PublishedIndex, changes: Sequence[Change]) -> None:
        self._base, self._changes = base, changes
        self._delta = Delta(base.store, base.metadata.schema).after(changes)

    @property
    def num_vectors(self) -> int:
        return self._base.num_vectors - len(self._delta.hidden) + self._delta.num_vectors

    @property
    def dim(self) -> int:
        return self._base.dim

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({"base": self._base.fingerprint, "changes": _digest(self._changes)})

    @cached_property
    def parents(self) -> Mapping[str, str]:
        """Those of the base, but not what it alone was made of; and the base itself."""
        kept = {name: self._base.manifest.parents[name] for name in _KEPT_PARENTS & self._base.manifest.parents.keys()}
        return {**kept, "base": self._base.fingerprint, "changes": _digest(self._changes)}

    @property
    def details(self) -> Mapping[str, Any]:
        of_base = self._base.manifest.details
        names = ("encoder_fingerprint", "transform_fingerprint")
        known = {name: of_base[name] for name in names if name in of_base}
        return {**known, "absorbed_sequence": self._changes[-1].sequence}

    @property
    def encoder_folder(self) -> Path | None:
        folder = self._base.folder / ENCODER_FOLDER
        return folder if folder.exists() else None

    @property
    def shards_folder(self) -> Path | None:
        return self._base.shards_folder if "shards" in self._base.manifest.locations else None

    def ids(self) -> Int64[ndarray, "vectors"]:
        of_base = np.asarray(self._base.store.ids)
        kept = of_base[~is_among(of_base, self._delta.hidden)]
        return np.insert(kept, np.searchsorted(kept, self._delta.ids), self._delta.ids)

    def blocks(self) -> Iterator[VectorBlock]:
        """At most 32 MiB each, in the number format of the base."""
        stored = self._base.store.vectors
        ids = self.ids()
        step = max(1, _BLOCK_BYTES // (stored.dtype.itemsize * self.dim))
        for start in range(0, len(ids), step):
            block_ids = ids[start : start + step]
            is_added = is_among(block_ids, self._delta.ids)
            vectors = np.empty((len(block_ids), self.dim), stored.dtype)
            vectors[is_added] = self._delta.store.vectors_of(block_ids[is_added])
            vectors[~is_added] = stored[self._base.store.rows_of(block_ids[~is_added])]
            yield VectorBlock(vectors, block_ids)

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> pa.Table:
        is_added = is_among(ids, self._delta.ids)
        base_rows = self._base.store.rows_of(ids[~is_added])
        added_rows = self._delta.store.rows_of(ids[is_added])
        parts = [self._base.metadata.take(pa.array(base_rows)), self._delta.metadata.take(pa.array(added_rows))]
        places = np.empty(len(ids), np.int64)
        places[~is_added] = np.arange(len(base_rows))
        places[is_added] = len(base_rows) + np.arange(len(added_rows))
        return pa.concat_tables(parts).take(pa.array(places))

    def check(self) -> None:
        """Raises ChecksumMismatch where the version that this is made from was damaged."""
        self._base.check()


# Of pictures and vectors that were added, too, these tell the truth; an embedding set or foreign files would not.
_KEPT_PARENTS = {"encoder", "shards"}


def _digest(changes: Sequence[Change]) -> str:
    """SHA-256 of all that a build takes from changes."""
    digest = hashlib.sha256()
    for change in changes:
        head = [change.sequence, change.id, change.vector is None, dict(change.metadata)]
        digest.update(json.dumps(head, sort_keys=True).encode())
        if change.vector is not None:
            digest.update(change.vector.tobytes())
    return digest.hexdigest()


def _goal(journal: Journal, folder: Path, version: str, absorbed: int) -> int:
    """Up to which number to go: as far as a killed compaction of this version meant to, to go on with its work."""
    if not journal.num_changes_after(absorbed):
        return absorbed
    with journal.writing() as transaction:
        begun_version, _, begun_through = str(transaction.fact("compaction") or "").partition(" ")
        if begun_version == version and any(folder.glob(".unfinished-*")):
            return int(begun_through)
        through = int(transaction.fact("last_sequence"))
        transaction.set_fact("compaction", f"{version} {through}")
        return through
