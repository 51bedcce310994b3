"""Settings of embedding and index building; imports neither torch nor faiss."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lookalike.settings import Settings


class EmbedSettings(Settings):
    """How pictures become vectors."""

    batch_size: PositiveInt = 64
    """Pictures per forward pass; memory grows with it, results change by rounding only."""
    storage: Literal["float32", "float16"] = "float32"
    """Number format of the stored vectors."""


class IndexSettings(Settings):
    """How vectors become a searchable index."""

    type: str = "auto"
    """`auto`, `Flat`, or `IVF<partitions>,Flat`; auto takes Flat up to `largest_flat` vectors."""
    largest_flat: PositiveInt = 50_000
    """Up to this many vectors `auto` scans all of them, which is exact."""
    target_recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the exact 10 nearest that the default number of probes must find."""
    num_measured_queries: PositiveInt = 200
    """Vectors of the collection used as queries to measure recall and latency."""
    seed: int = 0
    """Of the choice of measured queries and training vectors."""
