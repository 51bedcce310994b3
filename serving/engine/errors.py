"""What the engine refuses, each with what a caller needs to tell why."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lookalike.errors import ArtifactError, DataError, ResourceError

logger = logging.getLogger(__name__)
_FOLDERS = re.compile(r"(?<![\w:/])/(?:[^\s/,;:'\"]+/)+")


class OverloadedError(ResourceError):
    """More was asked than can be answered in time; nothing was begun."""

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnknownItemError(DataError):
    """The index holds no picture with this id."""


class IdTakenError(DataError):
    """The index holds a picture with this id already."""


class UnfitItemError(DataError):
    """An id or metadata that the index cannot hold."""


class UnknownVersionError(DataError):
    """The index has no version of this name, or none before the current one."""


class VersionRefusedError(ArtifactError):
    """A version that cannot serve or be searched, for what it is or what the journal holds."""


class VersionUnavailableError(ResourceError):
    """Versions that cannot be opened, changed over to or told at this moment."""


class CompactionFailedError(ResourceError):
    """A compaction that was begun, and failed."""


class ComparisonOffError(ResourceError):
    """This server searches the version that serves, and no other."""


class PicturesUnavailableError(ResourceError):
    """There is no picture behind this item that the server could show."""


class EncoderUnavailableError(ResourceError):
    """The index was made of vectors alone, or this server serves vectors only: no picture can become a vector."""


class UnsearchableVectorError(DataError):
    """A vector that no gallery vector can be compared with."""

    def __init__(
        self, reason: Literal["wrong_dim", "not_finite", "no_direction", "cancelled_out"], message: str
    ) -> None:
        super().__init__(message)
        self.reason = reason


class UnsearchableRegionError(DataError):
    """A region that holds nothing of its picture."""

    def __init__(self, reason: Literal["empty", "outside"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnsearchableFilterError(DataError):
    """A condition that the metadata cannot be held against."""


@contextmanager
def version_refusals(folder: Path) -> Iterator[None]:
    """Around work on an index's versions: what goes wrong, told to those who may only search; what lies where is in the
    log alone.

    Raises:
        VersionRefusedError: for an ArtifactError.
        CompactionFailedError: as it is, but without folders.
        VersionUnavailableError: for any other ResourceError but OverloadedError, which is no version's fault.
    """
    try:
        yield
    except OverloadedError:
        raise
    except (ArtifactError, ResourceError) as error:
        logger.warning("index %s: %s", folder, error)
        message = without_folders(str(error), folder)
        if isinstance(error, ArtifactError):
            raise VersionRefusedError(message) from error
        if isinstance(error, CompactionFailedError):
            raise CompactionFailedError(message) from error
        raise VersionUnavailableError(message) from error


def without_folders(message: str, folder: Path) -> str:
    """The message with `v0001/ids.npy` in place of `/data/shop/v0001/ids.npy`, and of other paths the names alone."""
    for index in {str(folder), str(folder.absolute()), str(folder.resolve())}:
        message = message.replace(f"{index}/", "").replace(f"{index} ", "the index ")
    return _FOLDERS.sub("", message)
