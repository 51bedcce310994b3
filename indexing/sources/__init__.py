"""What an index is built from: embedding sets, and vectors that other programs made."""

from pathlib import Path

from indexing.sources.embeddings import EmbeddingSource
from indexing.vector_source import VectorSource


def open_source(embeddings: Path) -> VectorSource:
    """The vectors of an embedding set.

    Raises:
        ArtifactError: there is none, or its manifest is damaged.
    """
    return EmbeddingSource.open(embeddings)
