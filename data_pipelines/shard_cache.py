"""Shards that lie elsewhere: fetched whole when first read, kept on a local disk up to a size, shared by processes."""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import tenacity
from pydantic import ValidationError

from data_pipelines.settings import ShardCacheSettings
from lookalike.artifacts import (
    MANIFEST_NAME,
    Manifest,
    file_sha256,
    publishing,
    read_manifest,
    write_text_atomically,
)
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError, ResourceError

ORIGIN_NAME = "origin.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The cache removes what it named itself, and nothing else: its folder may hold other people's files.
_OWN_STEM = "[0-9a-f]" * 64
# What the writer gives; no other name can lead out of the folder or cover a file of the cache's own.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LONGEST_WAIT_SECONDS = 60.0

logger = logging.getLogger(__name__)


class ShardCache:
    """The shards of one remote set in a cache folder; any number of sets, processes and threads share the folder.

    Files are named by their SHA-256, so what is there was verified and never grows old. `CACHE/shards` holds shards,
    one lock for each and one for all; `CACHE/sets` holds the tables of each set and where it came from.
    """

    def __init__(self, url: str, settings: ShardCacheSettings, manifest: Manifest) -> None:
        self._url = url
        self._settings = settings
        self._files = manifest.files
        self._folder = settings.folder / "shards"
        with _usable(settings):
            self._folder.mkdir(parents=True, exist_ok=True)
        num_bytes = sum(manifest.files[name]["bytes"] for name in manifest.details["shards"])
        if num_bytes > settings.max_bytes:
            logger.warning(
                "%s has %d bytes of shards, its cache %s keeps %d: class-balanced reading will fetch shards again and "
                "again. Allow the cache more.", url, num_bytes, settings.folder, settings.max_bytes
            )  # fmt: skip

    def open(self, name: str) -> int:
        """A descriptor of a shard, fetched if need be; it stays readable when the shard is evicted.

        Raises:
            DataError: the shard cannot be fetched, or is not the one of the manifest, after all attempts.
            ResourceError: it does not fit, or the cache's folder cannot be used.
        """
        path = self._folder / f"{self._files[name]['sha256']}.tar"
        with _usable(self._settings):
            while True:
                descriptor = self._open_whole(name, path)
                if descriptor is not None:
                    return descriptor
                with _locked(path.with_suffix(".lock")):
                    if not self._is_whole(name, path):
                        self._fetch(name, path)

    def _open_whole(self, name: str, path: Path) -> int | None:
        """A descriptor, or None where the shard is not there or was cut by a crash."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != self._files[name]["bytes"]:
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            os.utime(path)  # least recently used goes first
        return descriptor

    def _is_whole(self, name: str, path: Path) -> bool:
        return path.exists() and path.stat().st_size == self._files[name]["bytes"]

    def _fetch(self, name: str, path: Path) -> None:
        size = self._files[name]["bytes"]
        if size > self._settings.max_bytes:
            raise ResourceError(
                f"{name} of {self._url} has {size} bytes, the cache {self._settings.folder} keeps "
                f"{self._settings.max_bytes}. Allow it more."
            )
        partial = path.with_suffix(".partial")
        try:
            _download(f"{self._url}/{name}", partial, self._files[name], self._settings)
            _fsync(partial)
            with _locked(self._folder / "lock"):
                self._make_room(size)
                partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes the least recently used shards, and what killed downloads left."""
        for partial in self._folder.glob(f"{_OWN_STEM}.partial"):
            _remove_unless_locked(partial)
        shards = sorted(
            (path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._folder.glob(f"{_OWN_STEM}.tar")
        )
        surplus = sum(num_bytes for _, num_bytes, _ in shards) + size - self._settings.max_bytes
        for _, num_bytes, path in shards:
            if surplus <= 0:
                return
            path.unlink(missing_ok=True)
            surplus -= num_bytes


def fetch_tables(url: str, settings: ShardCacheSettings, *, kind: str, newest_version: int) -> Path:
    """Fetches all of a remote set but its shards; the folder is what `cache_of` recognises.

    Raises:
        DataError: a file cannot be fetched.
        ArtifactError: there is no shard set that this version reads, or its manifest names files that none has.
        ResourceError: the cache's folder cannot be used.
    """
    url = url.rstrip("/")
    sets = settings.folder / "sets"
    with _usable(settings):
        sets.mkdir(parents=True, exist_ok=True)
    with _usable(settings), _locked(sets / "lock"):
        manifest = _fetch_manifest(url, sets / "incoming", settings, kind=kind, newest_version=newest_version)
        folder = sets / manifest.fingerprint[:32]
        origin = json.dumps({"url": url, "cache": settings.model_dump(mode="json")})
        if folder.exists():
            write_text_atomically(folder / ORIGIN_NAME, origin)
            return folder
        with publishing(folder) as temporary:
            (sets / "incoming" / MANIFEST_NAME).rename(temporary / MANIFEST_NAME)
            for name in manifest.files.keys() - manifest.details["shards"].keys():
                _download(f"{url}/{name}", temporary / name, manifest.files[name], settings)
            (temporary / ORIGIN_NAME).write_text(origin, encoding="utf-8")
    return folder


def cache_of(folder: Path, manifest: Manifest) -> ShardCache | None:
    """The cache that a set's shards are in, or None for a set that lies in `folder` itself."""
    try:
        origin = json.loads((folder / ORIGIN_NAME).read_text(encoding="utf-8"))
        _require_safe(manifest, where=folder)
        return ShardCache(origin["url"], ShardCacheSettings.model_validate(origin["cache"]), manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, ValidationError) as error:
        raise ArtifactError(f"{folder / ORIGIN_NAME} cannot be read: {error}. Remove {folder}.") from error


def _fetch_manifest(
    url: str, incoming: Path, settings: ShardCacheSettings, *, kind: str, newest_version: int
) -> Manifest:
    incoming.mkdir(exist_ok=True)
    _download(f"{url}/{MANIFEST_NAME}", incoming / MANIFEST_NAME, None, settings)
    manifest = read_manifest(incoming, kind=kind, newest_version=newest_version)
    _require_safe(manifest, where=url)
    return manifest


def _require_safe(manifest: Manifest, *, where: object) -> None:
    """Refuses names and checksums that would become paths outside the set or the cache.

    A manifest's fingerprint shows damage, not intent: whoever serves the files can make one that fits.
    """
    for name, entry in manifest.files.items():
        is_own = name in (MANIFEST_NAME, ORIGIN_NAME)
        if is_own or not _SAFE_NAME.fullmatch(name) or not _SHA256.fullmatch(str(entry.get("sha256"))):
            raise ArtifactError(
                f"the manifest of {where} names a file {name!r} as no shard set holds it. Do not use it."
            )
    missing = manifest.details["shards"].keys() - manifest.files.keys()
    if missing:
        raise ArtifactError(f"the manifest of {where} describes {min(missing)} without its size and checksum.")


def _download(url: str, target: Path, expected: Mapping[str, Any] | None, settings: ShardCacheSettings) -> None:
    """Fetches one file and compares it with its manifest entry; tries again with growing pauses, then names it."""
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(settings.num_attempts),
        wait=tenacity.wait_random_exponential(settings.first_wait_seconds, _LONGEST_WAIT_SECONDS),
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    try:
        attempts(_download_once, url, target, expected)
    except ImportError as error:
        raise ResourceError(f"{url} needs another package: {error}. See the extras http, s3 and gs.") from error
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist. Give the address of a finished shard set.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ResourceError(
                f"no space left in {target.parent} for {url}. Free some, or lower max_bytes."
            ) from error
        raise DataError(
            f"{url} could not be fetched in {settings.num_attempts} attempts: {error or type(error).__name__}. "
            "Check the network and the address."
        ) from error


def _download_once(url: str, target: Path, expected: Mapping[str, Any] | None) -> None:
    file_system, path = fsspec.core.url_to_fs(url)
    file_system.get_file(path, str(target))
    if expected is not None and (target.stat().st_size, file_sha256(target)) != (expected["bytes"], expected["sha256"]):
        raise ChecksumMismatch(f"{target.stat().st_size} bytes came, which are not those of the manifest")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return False
    return isinstance(error, Exception) and not isinstance(error, FileNotFoundError | ImportError)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes and threads; the lock ends with its holder, however that ends."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unless_locked(partial: Path) -> None:
    """Removes what a killed download left; under its lock, or one that starts just then would lose its file."""
    with partial.with_suffix(".lock").open("w") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink(missing_ok=True)


@contextmanager
def _usable(settings: ShardCacheSettings) -> Iterator[None]:
    """Names the cache where the file system refuses something."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"the shard cache {settings.folder} cannot be used: {error}. Choose another folder, or free it."
        ) from error


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
