"""Where a version grows: `.unfinished-<version>` in the index folder, kept until the version is whole.

What a stage makes appears under its name at once and durable, so what is there is whole, and a rerun goes on behind it.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexing.versions import becoming_current, details_of, next_version, set_current_version, versions_of
from lookalike.artifacts import write_text_atomically
from lookalike.errors import ResourceError

_PREFIX = ".unfinished-"
_SOURCE_NAME = "source.json"
_SETTINGS_NAME = "settings.json"
# Made from the source alone: other settings need not read it again.
STORE_FILES = ("vectors.npy", "ids.npy", "metadata.arrow")


@dataclass(frozen=True, slots=True)
class Staging:
    """The unfinished version of an index folder."""

    folder: Path

    @property
    def version(self) -> str:
        return self.folder.name.removeprefix(_PREFIX)

    @property
    def version_folder(self) -> Path:
        """What will be published; everything beside it is gone afterwards."""
        return self.folder / "version"

    def bytes_beside_store(self) -> int:
        """Taken on disk by everything but the copy of the vectors and their metadata."""
        stored = (self.version_folder / name for name in STORE_FILES)
        return bytes_on_disk(self.folder) - sum(path.stat().st_blocks * 512 for path in stored)

    def read(self, name: str) -> Any:
        """The JSON value of a finished step, or None."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write(self, name: str, value: Any) -> None:
        write_text_atomically(self.folder / name, json.dumps(value, indent=1) + "\n")

    def publish(self) -> None:
        """Makes the version visible and current."""
        target = self.folder.with_name(self.version)
        for path in (*self.version_folder.rglob("*"), self.version_folder):
            fsync(path)
        self.version_folder.rename(target)
        fsync(target.parent)
        set_current_version(target.parent, self.version)
        shutil.rmtree(self.folder)


def unfinished_version(folder: Path) -> Staging:
    """Where the next version grows; the same answer on every rank."""
    return Staging(folder / f"{_PREFIX}{next_version(folder)}")


@contextmanager
def open_staging(folder: Path, *, source: Any, settings: Any) -> Iterator[Staging]:
    """Continues the unfinished version of `folder`, or starts one; no other process can work on it meanwhile.

    Args:
        source: Identifies the vectors; where a killed process worked on others, its work is thrown away.
        settings: Where they differ, only the copy of the vectors is kept.

    Raises:
        ResourceError: another process builds in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = unfinished_version(folder)
    for leftover in sorted(folder.glob(f"{_PREFIX}*")):
        with _locked(leftover):
            if leftover.name.removeprefix(_PREFIX) in versions_of(folder):
                shutil.rmtree(leftover)  # its version was published, and only this last step is missing
            elif leftover != staging.folder and not staging.folder.exists():
                leftover.rename(staging.folder)
    staging.folder.mkdir(exist_ok=True)
    with _locked(staging.folder):
        if staging.read(_SOURCE_NAME) != source:
            _remove_all(staging.folder)
            staging.write(_SOURCE_NAME, source)
        if staging.read(_SETTINGS_NAME) != settings:
            _remove_all(staging.folder, but=(_SOURCE_NAME, "version", "store.json"))
            if staging.version_folder.exists():
                _remove_all(staging.version_folder, but=(*STORE_FILES, *(f"{name}.partial" for name in STORE_FILES)))
            staging.write(_SETTINGS_NAME, settings)
        staging.version_folder.mkdir(exist_ok=True)
        yield staging


def finish_publication(folder: Path, *, source: Any, settings: Any) -> None:
    """Makes a version current whose builder was killed right before doing so.

    Only where it was made from this very source with these settings: another one is not what the caller asked for.
    """
    for leftover in folder.glob(f"{_PREFIX}*"):
        staging = Staging(leftover)
        is_same = staging.read(_SOURCE_NAME) == source and staging.read(_SETTINGS_NAME) == settings
        if is_same and staging.version in versions_of(folder):
            details = details_of(folder, staging.version)
            with _locked(leftover), becoming_current(folder, details, version=staging.version):
                set_current_version(folder, staging.version)
                shutil.rmtree(leftover)


@contextmanager
def publishing_file(path: Path) -> Iterator[Path]:
    """Yields another name for `path`; what is written there appears at `path` once it is whole and durable."""
    temporary = path.with_name(f"{path.name}.writing")
    yield temporary
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def reserve(path: Path, num_bytes: int) -> None:
    """Makes a file of zeros that has its room on disk: a full disk shows here, not as a bus error in mapped memory."""
    with path.open("wb") as file:
        if num_bytes:
            os.posix_fallocate(file.fileno(), 0, num_bytes)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_on_disk(folder: Path) -> int:
    """Of all files below `folder`."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def require_disk_space(folder: Path, num_bytes: int, *, purpose: str) -> None:
    """Raises ResourceError unless `num_bytes` more can be written below `folder`, which exists unless they are 0."""
    free = shutil.disk_usage(folder).free if num_bytes else 0
    if num_bytes > free:
        raise ResourceError(
            f"{purpose} needs {num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) more in {folder}, but its disk has "
            f"{free} bytes ({free / 2**30:.2f} GiB) free. Free some, or build elsewhere; what is done is kept."
        )


@contextmanager
def full_disk_explained(folder: Path, num_bytes: int, *, purpose: str) -> Iterator[None]:
    """Turns the many ways to run out of disk space into one ResourceError.

    Args:
        num_bytes: What the work needs; 0 where it is little.
    """
    require_disk_space(folder, num_bytes, purpose=purpose)
    try:
        yield
    except (OSError, RuntimeError) as error:
        # faiss raises RuntimeError with the system's words.
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else _is_about_space(error)
        if not is_full:
            raise
        need = f": {purpose} needs {num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) more" if num_bytes else ""
        raise ResourceError(
            f"The disk of {folder} is full{need}. Free some and run the same command again; what is done is kept."
        ) from error


def _is_about_space(error: RuntimeError) -> bool:
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ResourceError(f"Another process is building in {folder.parent}. Wait until it is done.") from None
    finally:
        os.close(descriptor)


def _remove_all(folder: Path, *, but: tuple[str, ...] = ()) -> None:
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
