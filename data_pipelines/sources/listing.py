"""Pictures named by a CSV or Parquet table; paths are relative to the table's folder."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow import csv, parquet

from data_pipelines.settings import ListingSettings
from data_pipelines.sources import SourcePicture, checked, safe_keys
from lookalike.errors import DataError

_COLUMNS = ("path", "label", "coarse_label", "split", "key")


class Listing:
    """Columns: path, and optionally label, coarse_label, split (default `all`) and key (default: from the path)."""

    def __init__(self, settings: ListingSettings) -> None:
        self.settings = settings

    def pictures(self) -> Sequence[SourcePicture]:
        file = self.settings.file
        columns = _read_columns(file)
        names: list[str] = [name or "" for name in columns["path"]]
        folder = file.parent
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DataError(
                f"{file}: {len(missing)} of {len(names)} files do not exist, first {missing[0]!r}. "
                f"Paths are taken from {folder}."
            )
        keys = columns["key"] if any(columns["key"]) else safe_keys([name.lstrip("/") for name in names])
        rows = zip(keys, names, columns["label"], columns["split"], columns["coarse_label"], strict=True)
        return checked(
            (
                SourcePicture(key or "", folder / name, label or None, split or "all", coarse_label or None)
                for key, name, label, split, coarse_label in rows
            ),
            where=str(file),
        )


def _read_columns(file: Path) -> dict[str, list[str | None]]:
    """The known columns as text; a column that is not there is all None."""
    try:
        table = parquet.read_table(file) if file.suffix.lower() == ".parquet" else _read_csv(file)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as a listing: {error}") from error
    if "path" not in table.column_names:
        raise DataError(f"{file} has no column `path`; it has {', '.join(table.column_names)}.")
    absent: list[str | None] = [None] * table.num_rows
    try:
        return {
            name: table[name].cast(pyarrow.string()).to_pylist() if name in table.column_names else absent
            for name in _COLUMNS
        }
    except (KeyError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # a column twice, or no text in it
        raise DataError(f"{file} cannot be read as a listing: {error}") from error


def _read_csv(file: Path) -> pyarrow.Table:
    # As text: class 007 stays 007.
    as_text = csv.ConvertOptions(column_types={name: pyarrow.string() for name in _COLUMNS})
    return csv.read_csv(file, convert_options=as_text)
