"""Versions of the index."""

from serving.schemas.fields import AnswerModel, RequestModel, VersionName


class VersionAnswer(AnswerModel):
    """One published version."""

    version: str
    """Its name; later ones have higher numbers."""
    is_current: bool
    """Whether it is the one that searches are to use."""
    index_type: str
    """How it searches."""
    num_vectors: int
    """Pictures that it holds."""
    dim: int
    """Length of its vectors."""
    num_changes_since: int
    """Additions, replacements and deletions that it does not hold; they are searched beside it."""
    encoder_fingerprint: str | None
    """The encoder that made its vectors; null where that is not known."""


class IndexesAnswer(AnswerModel):
    """All versions that can be changed over to."""

    current: str
    """The version that searches are to use."""
    served: str
    """The version that this process uses: another one while it changes over, and where the current one was refused."""
    versions: list[VersionAnswer]
    """Oldest first."""
    num_changes: int
    """Additions, replacements and deletions since the current version was made: what a compaction would take in."""


class SwapRequest(RequestModel):
    """Which version is to be used."""

    version: VersionName
    """As in GET /v1/indexes."""


class CurrentVersionAnswer(AnswerModel):
    """The version that searches use from now on."""

    current: str
    """Its name."""
