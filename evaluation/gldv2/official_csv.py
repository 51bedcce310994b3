"""The csv files of Google Landmarks v2, line by line; what cannot be right is named by file and line."""

import re
from collections.abc import Iterator
from pathlib import Path

from lookalike.errors import DataError

MAX_LANDMARK = 10**18 - 1

_IMAGE_ID = re.compile("[0-9a-f]{16}")
_LANDMARK = re.compile("[0-9]{1,18}")  # up to MAX_LANDMARK, which fits an int64
_LONGEST_QUOTE = 40  # characters of a wrong value that a message repeats


def rows_by_query(file: Path, *, header: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yields each row that is not blank as (place for messages, test image, the other columns).

    Not with the csv module: the longest lists of images exceed what it takes as a field, and its limit is one for the
    whole process. No value of these files holds a comma or a quote, so that splitting is all there is to it.

    Args:
        header: The first line, which also says how many columns a row has.

    Raises:
        DataError: the file cannot be read or lacks its header; a row has more or fewer columns, does not start with an
            image id, or is the second one of its test image.
    """
    num_columns = len(header.split(","))
    seen: set[str] = set()
    for number, line in _numbered_lines(file):
        where = f"{file}, line {number}"
        columns = [column.strip().removeprefix('"').removesuffix('"') for column in line.split(",")]
        if number == 1:
            if columns != header.split(","):
                raise DataError(f"{where}: the header should be {header!r}, found {_quoted(line)}.")
            continue
        if not line.strip():
            continue
        if len(columns) != num_columns:
            raise DataError(f"{where}: {num_columns} columns are expected ({header}), found {len(columns)}.")
        query = image_id(columns[0], where)
        if query in seen:
            raise DataError(f"{where}: test image {query} has a row already. Keep one of them.")
        seen.add(query)
        yield where, query, columns[1:]


def image_id(text: str, where: str) -> str:
    """Raises DataError where `text` is not an official image id."""
    if not is_image_id(text):
        raise DataError(f"{where}: {_quoted(text)} is no image id, which is 16 hexadecimal digits in lower case.")
    return text


def is_image_id(text: str) -> bool:
    return _IMAGE_ID.fullmatch(text) is not None


def landmark_id(text: str, where: str) -> int:
    """Raises DataError where `text` is not a whole number from 0."""
    if not _LANDMARK.fullmatch(text):
        raise DataError(f"{where}: {_quoted(text)} is no landmark, which is a whole number from 0.")
    return int(text)


def score(text: str, where: str) -> float:
    """Raises DataError where `text` is not a finite number: nothing could be sorted by it."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{where}: the score {_quoted(text)} is not a finite number.")
    return value


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """From line 1, which is there even in an empty file."""
    try:
        # Some tools start text files with a byte order mark.
        with file.open(encoding="utf-8-sig") as lines:
            yield 1, next(lines, "")
            yield from enumerate(lines, start=2)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _quoted(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...")
