"""Settings of embedding and index building; imports neither torch nor faiss."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, PositiveInt

from lookalike.settings import Settings


class EmbedSettings(Settings):
    """How pictures become vectors."""

    batch_size: PositiveInt = 64
    """Pictures per forward pass; memory grows with it, results change by rounding only. On a processor each core takes
    16 of them at a time, so more than four cores need more."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the network's multiplications; bfloat16 is faster on hardware made for it, and coarser."""
    storage: Literal["float32", "float16"] = "float32"
    """Number format of the stored vectors."""


def _milliseconds(value: object) -> object:
    """`5ms`, `0.5s` or a plain number of milliseconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|)\s*", value)
    if match is None:
        raise ValueError(f"{value!r} is not a time such as 5ms or 0.5s")
    return float(match.group(1)) * (1000 if match.group(2) == "s" else 1)


class IndexSettings(Settings):
    """How vectors become a searchable index."""

    type: str = "auto"
    """`auto`, `Flat`, `IVF<partitions>,<Flat|SQfp16|SQ8|RaBitQ>` or `HNSW<links>[,SQ8]`; auto plans it."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the exact nearest that searches find where they do not ask for something else."""
    at: Annotated[int, Field(ge=1, le=1000)] = 10
    """How many of the exact nearest `recall` speaks of."""
    ram: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory that a search may keep occupied, such as `2GiB`; any where none is given."""
    latency: Annotated[float, Field(gt=0), BeforeValidator(_milliseconds)] | None = None
    """Milliseconds that one query may take, such as `5ms`; any where none is given."""
    mode: Literal["single", "batch", "evaluation"] = "single"
    """Queries come one at a time, many at once (`latency` is each one's share), or once for an exact evaluation."""
    num_measured_queries: Annotated[int, Field(ge=10, le=4096)] = 1000
    """Vectors of the collection that are searched for to measure recall; more are taken where it scatters widely."""
    seed: int = 0
    """Of the choice of measured queries and training vectors."""
