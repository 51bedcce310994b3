"""Text lists and CSV files as data sets come with them; what cannot be read is named by file and line."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lookalike.errors import DataError


def read_rows(
    file: Path, *, num_columns: int, separator: str | None = None, header: str | None = None
) -> Iterator[list[str]]:
    """Yields the columns of each line that is not blank.

    Args:
        num_columns: The last column takes the rest of the line, separators included.
        separator: None is any white space.
        header: The first line to expect and to leave out; None where there is none.

    Raises:
        DataError: the file cannot be read, lacks its header, or a line has fewer columns.
    """
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text:
                continue
            if header is not None and number == 1:
                if text != header:
                    raise DataError(f"{file} should start with the line {header!r}, found {text[:100]!r}.")
                continue
            row = text.split(separator, num_columns - 1)
            if len(row) < num_columns:
                raise DataError(f"{file}, line {number}: {num_columns} columns are expected, found {text[:100]!r}.")
            yield row


def read_csv(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yields the named columns of each row of a CSV file with a header, as text.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    with _opened(file) as lines:
        reader = csv.DictReader(lines)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise DataError(f"{file} has no column {column}; it has {', '.join(reader.fieldnames or ['none'])}.")
        for row in reader:
            values = tuple(row[column] for column in columns)
            if None in values:
                raise DataError(f"{file}, line {reader.line_num}: the row ends before column {columns[-1]}.")
            yield values


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    try:
        # Some tools start text files with a byte order mark.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
