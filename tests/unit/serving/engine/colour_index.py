"""An index of colours, with an encoder of a known speed beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from indexing.building.build import build_index
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from serving.engine.query_engine import QueryEngine
from serving.engine.served_index import ServedIndex
from serving.engine.settings import EngineSettings
from tests.unit.serving.engine.fake_encoder import FakeEncoder, unit

COLOURS = [(r, g, b) for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 128, 255)][1:]


def build_colours(folder: Path, *, index_type: str = "Flat") -> Path:
    """Id n stands for `COLOURS[n]`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", np.stack([unit(colour) for colour in COLOURS]))
    names = ["-".join(map(str, colour)) for colour in COLOURS]
    table = pa.table({"key": names, "red": [colour[0] for colour in COLOURS], "width": [16] * len(COLOURS)})
    pq.write_table(table, folder / "metadata.parquet")
    source = ArraySource(folder / "vectors.npy", metadata=folder / "metadata.parquet")
    build_index(source, folder / "index", IndexSettings(type=index_type))
    return folder / "index"


class ServedColours(ServedIndex):
    """Serves an index of vectors alone as if the encoder had come with it."""

    def __init__(self, folder: Path, encoder: FakeEncoder) -> None:
        self._fake = encoder
        super().__init__(folder, load_encoder=lambda index: encoder)

    def _accept(self, base: Any) -> None:
        base.manifest.details["encoder_fingerprint"] = self._fake.fingerprint
        super()._accept(base)


def engine_of(index: Path, encoder: FakeEncoder, **settings: Any) -> QueryEngine:
    return QueryEngine(ServedColours(index, encoder), settings=EngineSettings(**settings), num_workers=4)
