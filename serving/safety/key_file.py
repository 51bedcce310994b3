"""API keys at rest: a JSON file of names, scopes and hashes. Imports no web framework."""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError

from lookalike.artifacts import write_atomically
from lookalike.errors import SettingsError
from lookalike.settings import Settings

KeyScope = Literal["read", "write"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
# A word to search for in logs and repositories that a key has slipped into.
KEY_PREFIX = "lookalike_"
_KEY_BYTES = 32
_SECONDS_BETWEEN_LOOKS = 1.0

logger = logging.getLogger(__name__)


class ApiKey(Settings):
    """What is known of one key; not the key itself, which is told once, when it is made."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Whose key it is; for logs and limits."""
    scopes: Annotated[tuple[KeyScope, ...], Field(min_length=1)]
    """What it is good for: `read` searches and shows, `write` adds, deletes and swaps versions."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key. Keys are 256 random bits, which nobody can try through, so a slow hash or salt would add nothing but
    its time to every request; those are for passwords, which people choose."""
    created: str
    """Day it was made."""


class _KeyFile(Settings):
    format_version: Literal[1]
    keys: tuple[ApiKey, ...]


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        SettingsError: the file is missing, or not one of ours.
    """
    try:
        return _KeyFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        raise SettingsError(f"key file {path} does not exist. Make a key: lookalike serve keys add NAME.") from None
    except (OSError, ValidationError) as error:
        reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error.strerror
        raise SettingsError(f"key file {path} cannot be read: {reason}. Put it right, or make a new one.") from None


def add_key(path: Path, name: str, scopes: Iterable[KeyScope], *, today: str) -> str:
    """Makes a key, adds its hash to the file, which is made where it is missing, and returns the key.

    Raises:
        SettingsError: the name is taken or malformed, or the file cannot be read.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    with _locked(path):
        known = read_keys(path) if path.exists() else ()
        if any(entry.name == name for entry in known):
            raise SettingsError(f"{path} already has a key named {name!r}. Remove it first, or choose another name.")
        try:
            entry = ApiKey(name=name, scopes=tuple(scopes), sha256=_digest(key), created=today)
        except ValidationError:
            found = f"a key cannot be named {name!r}"
            raise SettingsError(f"{found}. Use 1 to 64 letters, digits, dots, underscores, hyphens.") from None
        _write(path, (*known, entry))
    return key


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of the file; servers refuse it a second later.

    Raises:
        SettingsError: there is no such key, or the file cannot be read.
    """
    with _locked(path):
        known = read_keys(path)
        kept = tuple(entry for entry in known if entry.name != name)
        if len(kept) == len(known):
            names = ", ".join(entry.name for entry in known) or "none"
            raise SettingsError(f"{path} has no key named {name!r}. It has: {names}.")
        _write(path, kept)


class KeyRing:
    """The keys of a file, read again once it has changed; a file that has become unreadable changes nothing."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError where the file cannot be read."""
        self._path, self._clock = path, clock
        self._seen = self._stamp()
        self._keys = _by_digest(read_keys(path))
        self._next_look = clock() + _SECONDS_BETWEEN_LOOKS

    def find(self, key: str) -> ApiKey | None:
        """The key's entry; its time does not depend on how much of the key is right."""
        self._look_again()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        # All are compared, without an early end.
        for known, entry in self._keys:
            if hmac.compare_digest(known, digest):
                found = entry
        return found

    def _look_again(self) -> None:
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = _by_digest(read_keys(self._path))
        except SettingsError as error:
            logger.error("keys stay as they were: %s", error)
        else:
            logger.info("%s has changed: %d keys", self._path, len(self._keys))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _by_digest(keys: Iterable[ApiKey]) -> list[tuple[bytes, ApiKey]]:
    return [(bytes.fromhex(entry.sha256), entry) for entry in keys]


def _write(path: Path, keys: Iterable[ApiKey]) -> None:
    tree = _KeyFile(format_version=1, keys=tuple(keys)).model_dump(mode="json")
    write_atomically(path, (json.dumps(tree, indent=1) + "\n").encode())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One change at a time; it is the folder that is locked, because each change replaces the file."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
