"""What is served, and whether it is well."""

from typing import Literal

from data_pipelines.decode import ImageFormat
from serving.schemas.fields import AnswerModel


class EffortAnswer(AnswerModel):
    """How hard an approximate index looks; null is what its type does not have."""

    num_probes: int | None = None
    """Partitions visited."""
    breadth: int | None = None
    """Candidates kept while walking a graph."""
    candidates_per_hit: int
    """Candidates that are scored exactly, for each hit."""


class RecallPoint(AnswerModel):
    """What the index finds at one effort, measured when it was built."""

    effort: EffortAnswer
    """How hard it looks."""
    recall: float
    """Share of the exact nearest that are found."""


class LimitsAnswer(AnswerModel):
    """Bounds of one request, and of what waits."""

    max_body_bytes: int
    """Longest request body."""
    max_body_seconds: float
    """Longest time that a body may take to come in."""
    max_pixels: int
    """Largest picture, width times height."""
    max_side: int
    """Longer side of a picture, in pixels."""
    min_side: int
    """Shorter side of a picture, in pixels."""
    formats: list[ImageFormat]
    """Of pictures that are opened."""
    max_k: int
    """Most hits of one search."""
    max_shortlist: int
    """Most hits that are re-ranked in one search, and most that join its query."""
    max_items: int
    """Most items in one answer."""
    max_queries: int
    """Most searches of one batch."""
    max_parts: int
    """Most pictures, ids and vectors that are searched by together."""
    max_compared_versions: int
    """Most versions beside the one that serves that are open for searches; 0: they may name no other."""
    max_batch: int
    """Most queries that go through the encoder, or through one search, together."""
    max_waiting_pictures: int
    """Most pictures that wait for their vectors in one process; beyond, requests are refused at once."""
    max_waiting_searches: int
    """Most searches that wait or run in one process; beyond, requests are refused at once."""
    max_waiting_reads: int
    """Most lists and pictures that are asked for at a time in one process; beyond, requests are refused at once."""
    max_waiting_writes: int
    """Most changes of items that wait or run in one process; beyond, requests are refused at once."""
    max_wait_seconds: float
    """Longest time that a search, or making a vector, may be expected to take; else it is refused at once."""


class RateLimitAnswer(AnswerModel):
    """How much one client may ask, of each process."""

    requests_per_second: float
    """What it may keep up; each search of a batch counts."""
    burst: int
    """What it may send at once after it was silent."""


class InfoAnswer(AnswerModel):
    """What is served, by what."""

    index_version: str
    """The live version."""
    index_fingerprint: str
    """Identifies the content of the index."""
    index_type: str
    """How it searches."""
    encoder_fingerprint: str | None
    """The encoder that made the vectors; null where that is not known."""
    transform_fingerprint: str | None
    """How pictures were prepared for the encoder; null where that is not known."""
    takes_pictures: bool
    """Whether pictures can be searched with and added; else only vectors and ids."""
    takes_urls: bool
    """Whether a search may name pictures by address; from which hosts they are fetched is not told."""
    num_vectors: int
    """Pictures that can be found."""
    dim: int
    """Length of the vectors."""
    default_effort: EffortAnswer
    """How hard a search looks that asks for nothing else."""
    target_recall: float
    """What the default effort was chosen for."""
    recall_curve: list[RecallPoint]
    """Measured on the index's own vectors, ascending."""
    metadata_columns: list[str]
    """What filters may name."""
    rerank_methods: list[str]
    """What `rerank` may name."""
    has_pictures: bool
    """Whether originals can be shown."""
    limits: LimitsAnswer
    """Bounds of one request, and of what waits; named as the server's settings are."""
    rate_limit: RateLimitAnswer | None
    """How much the one who asks may ask; null where that is not limited."""
    scopes: list[Literal["read", "write"]]
    """What the one who asks may do."""
    versions: dict[str, str]
    """Of the server, Python and the libraries that compute."""


class HealthAnswer(AnswerModel):
    """The server is well."""

    status: Literal["ok"] = "ok"
    """Always `ok`; anything else is a problem."""
