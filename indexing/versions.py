"""The versions of an index: immutable folders `v0001`, `v0002`, ... and `CURRENT`, the name of the live one.

What an index holds is its current version and the changes in its journal that this version has not absorbed. A change
stays in the journal until every version that is left has absorbed it. So publishing another version of the same
collection, backwards or forwards, neither loses an addition nor brings back what was deleted.
"""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from indexing.living.journal import Journal
from lookalike.artifacts import read_manifest, write_text_atomically
from lookalike.errors import ArtifactError, ManifestMismatch, ResourceError

_CURRENT_NAME = "CURRENT"
_VERSION_NAME = re.compile(r"v\d{4,}")
_COMPACTION_LOCK_NAME = "compaction.lock"
_OUTGOING_PREFIX = ".outgoing-"


def current_version(folder: Path) -> str:
    try:
        return (folder / _CURRENT_NAME).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {_CURRENT_NAME} file" if folder.exists() else "it does not exist"
        raise ArtifactError(f"{folder} is not an index: {reason}. `lookalike index build` makes one.") from None


def require_index_folder(folder: Path) -> None:
    """Raises ArtifactError if `folder` holds anything but an index."""
    is_index = (folder / _CURRENT_NAME).exists() or versions_of(folder)
    if not is_index and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ArtifactError(f"{folder} holds something other than an index. Choose another folder.")


def set_current_version(folder: Path, version: str) -> None:
    write_text_atomically(folder / _CURRENT_NAME, version + "\n")


def stamp_of_current(folder: Path) -> tuple[int, int]:
    """Differs after another version became current. Microseconds."""
    try:
        state = (folder / _CURRENT_NAME).stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_ino, state.st_mtime_ns


def versions_of(folder: Path) -> list[str]:
    """Oldest first."""
    names = [path.name for path in folder.glob("v*") if _VERSION_NAME.fullmatch(path.name)]
    return sorted(names, key=lambda name: int(name[1:]))


def next_version(folder: Path) -> str:
    return f"v{1 + max((int(name[1:]) for name in versions_of(folder)), default=0):04d}"


def details_of(folder: Path, version: str) -> Mapping[str, Any]:
    """Of a version's manifest.

    Raises:
        ArtifactError: there is no such version.
    """
    if version not in versions_of(folder):
        known = ", ".join(versions_of(folder)) or "none"
        raise ArtifactError(f"{folder} has no version {version}; it has {known}.")
    return read_manifest(folder / version, kind="index", newest_version=2).details


def absorbed_sequence(details: Mapping[str, Any]) -> int:
    """Up to which number a version holds the changes of the journal; a build from files holds none."""
    return int(details.get("absorbed_sequence", 0))


def publish(folder: Path, version: str) -> None:
    """Makes a version the current one; servers change over by themselves.

    Raises:
        ArtifactError: there is no such version, or it does not go with the changes in the journal.
        ResourceError: a compaction is under way, whose version would take its place.
    """
    details_of(folder, version)
    with compacting(folder), becoming_current(folder, details_of(folder, version), version=version):
        set_current_version(folder, version)


def rollback(folder: Path) -> str:
    """Publishes the version before the current one, and returns its name; raises as `publish`, or if there is none."""
    version = version_before(folder, current_version(folder))
    publish(folder, version)
    return version


def version_before(folder: Path, version: str) -> str:
    """Raises ArtifactError if there is none."""
    older = [name for name in versions_of(folder) if int(name[1:]) < int(version[1:])]
    if not older:
        raise ArtifactError(f"{folder} has no version before {version}. `lookalike index versions` lists them.")
    return older[-1]


def require_fit_for_changes(folder: Path, details: Mapping[str, Any], *, version: str) -> None:
    """Whether an index may hold `version` and, after it, the changes in its journal.

    Args:
        details: Of the version's manifest: `dim`, and where known `encoder_fingerprint` and `absorbed_sequence`.

    Raises:
        ArtifactError: changes that the version lacks have left the journal.
        ManifestMismatch: the journal holds vectors of another encoder or dimension.
    """
    absorbed, encoder = absorbed_sequence(details), details.get("encoder_fingerprint")
    advice = "Go on from a later version; to start anew from files, build into another folder."
    with closing(Journal(folder)) as journal:
        trimmed_through, makers = journal.trimmed_through(), journal.makers_after(absorbed)
    if absorbed < trimmed_through:
        raise ArtifactError(
            f"{folder / version} lacks the changes {absorbed + 1} to {trimmed_through}, which only later versions "
            f"hold: with it, additions would be lost and deleted pictures come back. {advice}"
        )
    for maker, dim in makers:
        if dim != details["dim"] or (maker and encoder and maker != encoder):
            raise ManifestMismatch(
                f"{folder / version} has vectors of length {details['dim']} by encoder {(encoder or 'unknown')[:12]}, "
                f"but the journal holds additions of length {dim} by encoder {(maker or 'unknown')[:12]}. {advice}"
            )


@contextmanager
def becoming_current(folder: Path, details: Mapping[str, Any], *, version: str) -> Iterator[None]:
    """Inside, `version` goes with the changes in the journal, and nobody removes versions or those changes.

    Raises as `require_fit_for_changes`: changes may have come, and gone, during the hours that a build takes.
    """
    with _changing_versions(folder):
        require_fit_for_changes(folder, details, version=version)
        yield


def remove_old_versions(folder: Path, *, keep: int) -> list[str]:
    """Removes all but the `keep` newest versions and the current one, then the changes that only they needed.

    Who has a removed version open goes on reading it: its files stay until they are closed.

    Returns:
        The names of what was removed.

    Raises:
        ValueError: `keep` is not above 0; the newest stays, so that its number is never given again.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    with _changing_versions(folder):
        _tidy_up(folder)
        current = current_version(folder)
        removed = [name for name in versions_of(folder)[:-keep] if name != current]
        for name in removed:
            # Under another name first: a version that is half removed must not look like one.
            outgoing = folder / f"{_OUTGOING_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
            (folder / name).rename(outgoing)
            shutil.rmtree(outgoing)
        needed_after = min(absorbed_sequence(details_of(folder, name)) for name in versions_of(folder))
        with closing(Journal(folder)) as journal:
            if journal.trimmed_through() < needed_after:
                with journal.writing() as transaction:
                    transaction.trim(needed_after)
        return removed


@contextmanager
def compacting(folder: Path) -> Iterator[None]:
    """Keeps others from compacting or publishing meanwhile; the lock ends with the process, however it ends.

    Raises:
        ResourceError: somebody is compacting, or publishing, this very moment.
    """
    descriptor = os.open(folder / _COMPACTION_LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ResourceError(
            f"{folder} is being compacted, and the version that results will be published. Wait until it is done, or "
            "end that process: nothing is lost."
        ) from None
    finally:
        os.close(descriptor)


def require_no_compaction(folder: Path) -> None:
    """Raises ResourceError where somebody is compacting, or publishing, this very moment."""
    with compacting(folder):
        return


def _tidy_up(folder: Path) -> None:
    for leftover in folder.glob(f"{_OUTGOING_PREFIX}*"):
        shutil.rmtree(leftover)


@contextmanager
def _changing_versions(folder: Path) -> Iterator[None]:
    """Keeps other processes from choosing or removing versions meanwhile; the lock ends with the process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not an index: it does not exist.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
