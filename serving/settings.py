"""What a server is told before it starts. Imports neither torch nor faiss."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lookalike.settings import Settings

# No limit below can be set higher: the API's schema promises them.
MOST_HITS = 10_000
MOST_ITEMS = 1_000


class ServingLimits(Settings):
    """Bounds of one request; `/v1/info` tells them to clients."""

    max_body_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 30)] = 20 << 20
    """Longest request body, in bytes; a longer one is cut off while it is being read."""
    max_k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 1_000
    """Most hits of one search."""
    max_items: Annotated[int, Field(ge=1, le=MOST_ITEMS)] = 200
    """Most random items in one answer."""


class ServingSettings(Settings):
    """One server over one index."""

    index: Path
    """Folder of a published index."""
    shards: Path | None = None
    """Folder of the shards that hold the pictures; None takes the folder that the index remembers."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. Anyone who reaches it can search and see every picture: there are no accounts."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8_000
    """Port to listen on; 0 takes a free one."""
    num_workers: Annotated[int, Field(ge=1, le=256)] | None = None
    """Threads that decode pictures, search and read shards; None takes one per core. The encoder has its own."""
    limits: ServingLimits = ServingLimits()
    """Bounds of one request."""
