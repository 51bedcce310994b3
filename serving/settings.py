"""What a server is told before it starts. Imports neither torch nor faiss."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from data_pipelines.decode import DecodeLimits
from indexing.reranking.settings import LONGEST_SHORTLIST
from lookalike.settings import Settings
from serving.engine.settings import EngineSettings
from serving.observability.settings import ObservabilitySettings

# No limit below can be set higher: the API's schema promises them.
MOST_HITS = 10_000
MOST_ITEMS = 1_000
MOST_QUERIES = 1_000
MOST_PARTS = 64


class ServingLimits(Settings):
    """Bounds of one request, and of who sends it slowly; `/v1/info` tells them to clients."""

    max_body_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 30)] = 20 << 20
    """Longest request body, in bytes; a longer one is cut off while it is being read."""
    max_body_seconds: Annotated[float, Field(gt=0, le=3_600)] = 60.0
    """Longest time that a body may take to come in."""
    max_bytes_at_once: Annotated[int, Field(ge=1 << 10)] = 512 << 20
    """Most bytes of all bodies and fetched pictures that one process holds at a time; requests that would bring more
    get 503 at once."""
    max_wait_seconds: Annotated[float, Field(gt=0, le=3_600)] = 10.0
    """Longest time until a connection has sent the headers of its next request, or taken more of an answer."""
    max_connections: Annotated[int, Field(ge=1, le=1 << 20)] = 1_000
    """Most open connections of one process; more are answered with 503 at once. Each may send 64 KiB of headers to a
    request, and 64 requests ahead."""
    pictures: DecodeLimits = DecodeLimits()
    """Which pictures are searched with and added; told from a picture's header, before a pixel is decoded."""
    max_k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 1_000
    """Most hits of one search."""
    max_shortlist: Annotated[int, Field(ge=1, le=LONGEST_SHORTLIST)] = 200
    """Most hits that are re-ranked in one search, and most that join its query."""
    max_items: Annotated[int, Field(ge=1, le=MOST_ITEMS)] = 200
    """Most items in one answer."""
    max_queries: Annotated[int, Field(ge=1, le=MOST_QUERIES)] = 64
    """Most queries of one batch."""
    max_parts: Annotated[int, Field(ge=1, le=MOST_PARTS)] = 16
    """Most pictures, ids and vectors that make up one query."""


class RateLimit(Settings):
    """A token bucket for each key, and where there are no keys for each address; one set for each process.

    A server that only this machine reaches limits keys alone.
    """

    requests_per_second: Annotated[float, Field(gt=0, le=1e6)] = 50.0
    """What a client may keep up; each query of a batch counts."""
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """What a client that was silent may send at once."""
    max_clients: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    """Most clients that are remembered; 100,000 take some 20 MB. Beyond, those silent for longest are forgotten."""


class UrlFetching(Settings):
    """Pictures that a search names by address, which the server gets; off as long as no host is allowed."""

    hosts: tuple[Annotated[str, Field(min_length=1, max_length=253)], ...] = ()
    """Hosts that pictures are fetched from: `img.example`, `*.img.example` for all below it, `img.example:8443` for a
    port other than 80 and 443. Hosts at addresses of private networks are refused even so."""
    max_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 20 << 20
    """Longest file that is fetched."""
    max_seconds: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Longest time that a picture may take, redirects included."""
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3
    """Most redirects that are followed, all on the host that was asked first."""
    max_at_once: Annotated[int, Field(ge=1, le=1_000)] = 16
    """Most pictures that one process fetches at the same time; others wait, at most `max_seconds`."""


class ServingSettings(Settings):
    """One server over one index."""

    index: Path
    """Folder of a published index."""
    shards: Path | None = None
    """Folder of the shards that hold the pictures; None takes the folder that the index remembers."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. Any other than this machine's own demands keys, unless `requires_keys` is false."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8_000
    """Port to listen on; 0 takes a free one."""
    num_workers: Annotated[int, Field(ge=1, le=256)] | None = None
    """Threads that decode pictures, search and read shards; None takes one per core. The encoder has its own."""
    keys: Path | None = None
    """File of API keys, made by `lookalike serve keys add`; read again when it changes."""
    requires_keys: bool | None = None
    """Whether clients need a key; None: where other machines reach `host`, or where `keys` are given."""
    allows_writes: bool = False
    """Whether clients may add and delete where no keys are required; where they are, a key's scopes tell."""
    rate_limit: RateLimit = RateLimit()
    """How much one client may ask."""
    urls: UrlFetching = UrlFetching()
    """Pictures that a search names by address."""
    limits: ServingLimits = ServingLimits()
    """Bounds of one request."""
    num_processes: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that serve on one port, and share the index in memory; each has an encoder of its own."""
    engine: EngineSettings = EngineSettings()
    """Batches, queues and caches of one process."""
    observability: ObservabilitySettings = ObservabilitySettings()
    """Logs, traces and the recall canary."""
