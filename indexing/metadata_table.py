"""The metadata of one version: an Arrow file, memory-mapped, whose row r describes the vector of row r."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from lookalike.errors import DamagedArtifact

METADATA_NAME = "metadata.arrow"


class MetadataTable:
    """Only what is read is loaded; safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedArtifact where the file is missing or no Arrow file."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            # Each batch keeps its columns, and these refer to the mapped file: nothing is copied.
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise DamagedArtifact(f"{path} cannot be read: {error}. Build the index again.") from error
        self._schema = reader.schema
        self._names = self._schema.names
        self._columns = [batch.columns for batch in self._batches]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    @cached_property
    def table(self) -> pa.Table:
        return pa.Table.from_batches(self._batches, self._schema)

    def rows(self, rows: Int64[ndarray, "n"]) -> list[dict[str, Any]]:
        """The rows as dictionaries, in the order asked for."""
        if not self._names:
            return [{} for _ in rows]
        numbers = np.searchsorted(self._ends, rows, side="right")
        found: list[dict[str, Any]] = [{}] * len(rows)
        # Cell by cell: for rows that lie apart, `take` over a table of many batches costs several times as much.
        for place, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            columns = self._columns[number]
            within = row - (int(self._ends[number - 1]) if number else 0)
            found[place] = {name: column[within].as_py() for name, column in zip(self._names, columns, strict=True)}
        return found
