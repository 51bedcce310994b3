"""Where pictures come from. A source is one small file that offers `PictureSource`."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lookalike.errors import DataError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

# Dots would end a key inside a tar, and a leading double underscore would make WebDataset skip the sample.
_SAFE_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_SAFE_SPLIT = re.compile(r"[A-Za-z0-9_-]+")
_UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9-]+")


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """One picture on disk, and what is known about it."""

    key: str  # unique within the source; see `safe_keys`
    path: Path
    label: str | None  # name of its class
    split: str
    coarse_label: str | None = None  # name of the group that its class belongs to
    span: tuple[int, int] | None = None  # offset and number of the picture's bytes in the file; None: all of it
    box: tuple[int, int, int, int] | None = None  # the part to store: left, top, right, bottom, see `pixel_box`


@runtime_checkable
class PictureSource(Protocol):
    """Lists pictures; the same files on disk give the same list, in the order of the keys."""

    def pictures(self) -> Sequence[SourcePicture]:
        """Reads no picture.

        Raises:
            DataError: there are none, or what describes them contradicts itself.
        """
        ...


def pixel_box(corners: Sequence[int | float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom, each rounded, halves to even, as Pillow's `crop` does; right and bottom are excluded.

    Raises:
        ValueError: there are not four finite coordinates, or nothing lies between them.
    """
    left, top, right, bottom = (round(corner) for corner in corners)
    if not (left < right and top < bottom):
        raise ValueError(f"box {list(corners)} is empty")
    return left, top, right, bottom


def files_below(root: Path) -> Iterator[Path]:
    """All files under a folder, also through links, in no order; hidden ones are left out. None where it is absent.

    Raises:
        DataError: a folder cannot be listed, or is reached twice: whole classes would be missing, or count twice.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}.") from error

    if not root.exists():
        return
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        place = Path(folder).stat()
        if (place.st_dev, place.st_ino) in seen:
            raise DataError(f"{folder} is a link to a folder that is listed already: its pictures would count twice.")
        seen.add((place.st_dev, place.st_ino))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def safe_keys(names: Sequence[str]) -> list[str]:
    """A key for each relative path: without suffix, with only characters that every tar reader accepts.

    Where that makes two names equal, each of them gets a piece of the hash of its whole name.
    """
    plain = [_plain_key(name) for name in names]
    counts = Counter(plain)
    return [
        key if counts[key] == 1 else f"{key}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}"
        for key, name in zip(plain, names, strict=True)
    ]


def checked(pictures: Iterable[SourcePicture], *, where: str) -> list[SourcePicture]:
    """The pictures in the order of their keys.

    Raises:
        DataError: there are none, a key occurs twice, or a key or a split's name has characters that are not safe.
    """
    ordered = sorted(pictures, key=lambda picture: picture.key)
    if not ordered:
        raise DataError(f"{where} holds no pictures (files ending in {', '.join(sorted(PICTURE_SUFFIXES))}).")
    for before, picture in zip([None, *ordered], ordered, strict=False):
        if not _SAFE_KEY.fullmatch(picture.key):
            raise DataError(f"{where}: key {picture.key!r} may only hold A-Z a-z 0-9 _ - and / between parts.")
        if not _SAFE_SPLIT.fullmatch(picture.split):
            raise DataError(f"{where}: split {picture.split!r} may only hold A-Z a-z 0-9 _ and -.")
        if before is not None and before.key == picture.key:
            raise DataError(f"{where}: key {picture.key!r} occurs twice, for {before.path} and {picture.path}.")
    return ordered


def refuse_shared_classes(pictures: Sequence[SourcePicture], *, where: str) -> None:
    """Raises DataError if a class has pictures in more than one split."""
    splits_of_class: dict[str, set[str]] = {}
    for picture in pictures:
        if picture.label is not None:
            splits_of_class.setdefault(picture.label, set()).add(picture.split)
    shared = sorted(label for label, splits in splits_of_class.items() if len(splits) > 1)
    if shared:
        raise DataError(
            f"{where}: {len(shared)} of {len(splits_of_class)} classes are in more than one split, first {shared[0]!r} "
            f"({', '.join(sorted(splits_of_class[shared[0]]))}). Retrieval of unseen classes cannot be measured that "
            "way; move them, or allow shared classes."
        )


def _plain_key(name: str) -> str:
    stem = name.rpartition(".")[0] if "." in name.rpartition("/")[2][1:] else name
    return "/".join(_UNSAFE_CHARACTERS.sub("_", part) for part in stem.split("/"))
