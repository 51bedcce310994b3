"""How the engine divides its work. Imports neither torch nor faiss."""

from typing import Annotated

from pydantic import Field

from lookalike.settings import Settings


class EngineSettings(Settings):
    """Batches, queues and caches of one worker."""

    max_batch: Annotated[int, Field(ge=1, le=4096)] = 32
    """Most queries that go through the encoder, or through one search, together; a processor embeds at most 8."""
    max_batch_wait_ms: Annotated[float, Field(ge=0, le=1_000)] = 2.0
    """How long a busy stage waits for a fuller batch; an idle one never does."""
    max_waiting_pictures: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Most pictures between arrival and their vectors; beyond, requests are refused at once."""
    max_waiting_searches: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Most searches that wait or run, and most that wait for a version to be opened; beyond, requests are refused at
    once."""
    max_waiting_reads: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Most lists, items, thumbnails and originals that are asked for and not yet there; beyond, requests are refused at
    once. A browser asks for six at a time."""
    max_waiting_writes: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Most additions, replacements and deletions that wait or run; beyond, requests are refused at once. They come one
    after the other."""
    max_wait_seconds: Annotated[float, Field(gt=0, le=3_600)] = 5.0
    """Longest time that a search, or making a vector, may be expected to take, by the measured rate; else it is refused
    at once. Also the longest time that a search waits for a version to be opened."""
    scaled_decode: bool = False
    """Whether large JPEGs of queries are decoded at 1/2, 1/4 or 1/8 of their size: less work, but not quite the pixels
    that the gallery was embedded with. Off, a query's vector is that of the same picture in the gallery."""
    thumbnail_cache_bytes: Annotated[int, Field(ge=0, le=1 << 36)] = 64 << 20
    """Memory for thumbnails, in bytes."""
    max_compared_versions: Annotated[int, Field(ge=0, le=64)] = 2
    """Most versions that are open beside the one that serves, for the searches that name them; the one that was named
    longest ago makes room. An HNSW index lies in memory as a whole, and so does an encoder, unless it is that of the
    one that serves. 0: no other version can be searched."""
    vectors_only: bool = False
    """Whether the encoder is left out: searches by vector and id alone, without loading torch."""
