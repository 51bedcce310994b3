"""Artifacts: folders with a manifest, published by write-to-temporary + fsync + rename.

A folder that exists under its final name is whole. `manifest.json` says what made it, what it was made from
(the fingerprints of its parents) and the size and SHA-256 of each of its files.
"""

import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lookalike.errors import ArtifactError, ChecksumMismatch, DamagedArtifact, ManifestMismatch

MANIFEST_NAME = "manifest.json"
_TEMPORARY_PREFIX = ".unpublished-"
_OUTGOING_SUFFIX = "-outgoing"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is. Its fingerprint covers content and parents, not the machine or the time."""

    kind: str
    format_version: int
    parents: Mapping[str, str] = field(default_factory=dict)  # name -> fingerprint
    details: Mapping[str, Any] = field(default_factory=dict)  # counts and facts that readers rely on
    settings: Mapping[str, Any] = field(default_factory=dict)  # resolved settings of the maker
    locations: Mapping[str, str] = field(default_factory=dict)  # where parents lay when it was made, see `locations_of`
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # relative path -> {bytes, sha256}
    made_by: Mapping[str, str] = field(default_factory=dict)  # package, code and library versions
    measurements: Mapping[str, Any] = field(default_factory=dict)  # what depends on the machine and the time

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            {
                "kind": self.kind,
                "format_version": self.format_version,
                "parents": dict(self.parents),
                "details": dict(self.details),
                "files": {name: entry["sha256"] for name, entry in self.files.items()},
            }
        )


def fingerprint(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def publishing(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`; on success it is made durable and renamed to `folder`.

    On any error the temporary folder is removed and `folder` is as it was. What a killed process left behind is
    tidied up by the next publication of the same folder; what a living one is writing is let alone.

    Raises:
        ArtifactError: `folder` exists and `replace` is false.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tidy_up(folder)
    if folder.exists() and not replace:
        raise ArtifactError(f"{folder} exists already. Remove it, or choose another folder.")
    temporary = folder.parent / f"{_TEMPORARY_PREFIX}{folder.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    with _locked(temporary):
        try:
            yield temporary
            for path in temporary.rglob("*"):
                _fsync(path)
            _fsync(temporary)
            _rename_into_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _rename_into_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        _fsync(folder.parent)
        return
    outgoing = temporary.with_name(temporary.name + _OUTGOING_SUFFIX)
    folder.rename(outgoing)
    try:
        temporary.rename(folder)
    except BaseException:
        outgoing.rename(folder)
        raise
    _fsync(folder.parent)
    shutil.rmtree(outgoing)


def _tidy_up(folder: Path) -> None:
    """Removes what killed publications of `folder` left, and puts back a folder that one was about to replace."""
    name = re.compile(rf"{re.escape(_TEMPORARY_PREFIX + folder.name)}-[0-9a-f]{{8}}({_OUTGOING_SUFFIX})?")
    for leftover in folder.parent.iterdir():
        match = name.fullmatch(leftover.name)
        if match is None or _is_locked(leftover.with_name(leftover.name.removesuffix(_OUTGOING_SUFFIX))):
            continue
        if match.group(1) and not folder.exists():
            leftover.rename(folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Marks a folder as being written by a living process; the mark ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_manifest(folder: Path, manifest: Manifest, *, known_sha256: Mapping[str, str] | None = None) -> Manifest:
    """Completes `manifest` with the checksums of all files now in `folder` and the versions in use, and writes it.

    Args:
        known_sha256: Checksums of files whose writer took them, by relative path; the other files are read.
    """
    known = known_sha256 or {}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) and path.name != MANIFEST_NAME
    }
    complete = Manifest(**{**_fields(manifest), "files": files, "made_by": versions()})
    text = json.dumps({**_fields(complete), "fingerprint": complete.fingerprint}, indent=2, sort_keys=True)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return complete


def read_manifest(folder: Path, *, kind: str, newest_version: int) -> Manifest:
    """Reads and checks the manifest of an artifact of `kind` whose format is at most `newest_version`.

    Raises:
        ArtifactError: there is none, it is of another kind, from a newer program, or has been edited.
    """
    path = folder / MANIFEST_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found_kind, found_version = tree["kind"], tree["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it has no {MANIFEST_NAME}" if folder.exists() else "it does not exist"
        inside = folder / kind.replace(" ", "_")
        hint = f" Did you mean {inside}?" if (inside / MANIFEST_NAME).exists() else ""
        raise DamagedArtifact(f"{folder} is not a finished {kind}: {reason}.{hint}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DamagedArtifact(f"{path} cannot be read: {error}") from error
    if found_kind != kind:
        raise ArtifactError(f"{folder} is not what is expected here: found {found_kind}, expected {kind}.")
    if found_version > newest_version:
        raise ArtifactError(
            f"{folder} has {kind} format {found_version}, this version reads up to {newest_version}. Upgrade lookalike."
        )
    stored_fingerprint = tree.pop("fingerprint", None)
    try:
        manifest = Manifest(**tree)
    except TypeError as error:
        raise DamagedArtifact(f"{path} cannot be read: {error}") from error
    if manifest.fingerprint != stored_fingerprint:
        raise ChecksumMismatch(f"{path} was changed after it was written: its fingerprint does not match its content.")
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file with the manifest, byte by byte.

    Raises:
        ChecksumMismatch: a file is missing, has another size or other bytes; the message names it.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ChecksumMismatch(f"{path} is missing; its {manifest.kind} is incomplete. Make it again.")
        if path.stat().st_size != entry["bytes"]:
            raise ChecksumMismatch(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}.")
        if file_sha256(path) != entry["sha256"]:
            raise ChecksumMismatch(f"{path} differs from its manifest (SHA-256): the file was damaged or edited.")


def require_parent(child: Path, manifest: Manifest, name: str, *, found: str, parent: Path) -> None:
    """Refuses an artifact that was made from another parent than the one at hand.

    Raises:
        ManifestMismatch: names both folders and both fingerprints.
    """
    expected = manifest.parents.get(name)
    if expected != found:
        raise ManifestMismatch(
            f"{child} was made from {name} {(expected or 'none')[:12]}, but {parent} is {found[:12]}. "
            f"Make {child.name} again from this {name}, or give the {name} it was made from."
        )


def locations_of(parent: str, folder: Path, *, artifact: Path) -> dict[str, str]:
    """Two ways to a parent's folder: absolute, and as seen from the artifact, for when both are moved together."""
    return {
        parent: str(folder.resolve()),
        f"{parent} beside": os.path.relpath(folder.resolve(), artifact.resolve()),
    }


def locate_parent(artifact: Path, manifest: Manifest, parent: str) -> Path:
    """Where a parent's folder is now; whether it is the right one, its fingerprint tells."""
    beside = Path(os.path.normpath(artifact.resolve() / manifest.locations[f"{parent} beside"]))
    return beside if beside.exists() else Path(manifest.locations[parent])


def link_or_copy(source: Path, target: Path) -> None:
    """Gives `target` the bytes of an immutable file: a hard link where the file system allows one, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_text_atomically(path: Path, text: str) -> None:
    """See `write_atomically`; in UTF-8."""
    write_atomically(path, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a small file as a whole: readers see the old bytes or the new ones, also after a power cut."""
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        _fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@functools.cache
def versions() -> dict[str, str]:
    """Versions that explain a result: our package, the checkout's commit, Python and the libraries that compute."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for package in ("lookalike", "torch", "torchvision", "timm", "numpy", "pillow", "faiss-cpu", "faiss-gpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the checkout this code runs from, or "none" for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "none"
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return result.stdout.strip() or "none"


def _fields(manifest: Manifest) -> dict[str, Any]:
    return asdict(manifest)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
