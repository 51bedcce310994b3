"""The vectors of an embedding set, with the sample table of its shards as metadata."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from indexing.embedding_set import ENCODER_FOLDER, EmbeddingSet
from indexing.sources.finite_blocks import finite_blocks
from indexing.vector_source import VectorBlock
from lookalike.artifacts import require_parent
from lookalike.errors import DamagedArtifact

METADATA_COLUMNS = ["key", "class_name", "label", "split", "width", "height"]


@dataclass(frozen=True)
class EmbeddingSource:
    """A `VectorSource`."""

    embeddings: EmbeddingSet

    @classmethod
    def open(cls, folder: Path) -> "EmbeddingSource":
        return cls(EmbeddingSet.open(folder))

    @property
    def num_vectors(self) -> int:
        return int(self.embeddings.manifest.details["num_vectors"])

    @property
    def dim(self) -> int:
        return self.embeddings.dim

    @property
    def fingerprint(self) -> str:
        return self.embeddings.fingerprint

    @property
    def parents(self) -> Mapping[str, str]:
        made_from = self.embeddings.manifest.parents
        return {
            "embeddings": self.embeddings.fingerprint,
            "encoder": made_from["encoder"],
            "shards": made_from["shards"],
        }

    @property
    def details(self) -> Mapping[str, Any]:
        names = ("encoder_fingerprint", "transform_fingerprint")
        return {name: self.embeddings.manifest.details[name] for name in names}

    @property
    def encoder_folder(self) -> Path | None:
        return self.embeddings.folder / ENCODER_FOLDER

    @property
    def shards_folder(self) -> Path | None:
        return self.embeddings.shards_folder

    def ids(self) -> Int64[ndarray, "vectors"]:
        return self.embeddings.ids

    def blocks(self) -> Iterator[VectorBlock]:
        """Parts of the stored blocks, memory-mapped.

        Raises:
            DataError: a vector holds NaN or infinity.
            DamagedArtifact: a block cannot be read, or holds another number of vectors than of ids.
        """
        for path, vectors, ids in self.embeddings.blocks():
            if vectors.shape != (len(ids), self.dim):
                raise DamagedArtifact(
                    f"{path} holds vectors of shape {vectors.shape}, expected {(len(ids), self.dim)}. Embed again."
                )
            yield from finite_blocks(vectors, ids, where=path)

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> pa.Table:
        return self._samples.take(pa.array(ids))

    def check(self) -> None:
        """Compares every file with its checksum, and the shards with what was embedded.

        Raises:
            ChecksumMismatch: a file differs.
            ManifestMismatch: the shards were made anew since.
        """
        self.embeddings.check()
        shards = self._shards
        require_parent(
            self.embeddings.folder,
            self.embeddings.manifest,
            "shards",
            found=shards.fingerprint,
            parent=shards.folder,
        )

    @cached_property
    def _shards(self) -> ShardSet:
        return ShardSet.open(self.embeddings.shards_folder)

    @cached_property
    def _samples(self) -> pa.Table:
        return self._shards.samples.select(METADATA_COLUMNS)
