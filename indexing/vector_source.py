"""What an index can be built from: vectors with ids and metadata, read in blocks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray


@dataclass(frozen=True, slots=True)
class VectorBlock:
    """Some vectors and their ids."""

    vectors: ndarray  # [vectors, dim], float32 or float16, often memory-mapped
    ids: Int64[ndarray, "vectors"]


@runtime_checkable
class VectorSource(Protocol):
    """Vectors, from an embedding set or from somebody else's files."""

    @property
    def num_vectors(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of vectors, ids and metadata: what a resumed build must share with the one it continues."""
        ...

    @property
    def parents(self) -> Mapping[str, str]:
        """For the manifest of the index: name -> fingerprint."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """For the manifest of the index: `encoder_fingerprint` and `transform_fingerprint` where they are known."""
        ...

    @property
    def encoder_folder(self) -> Path | None:
        """The encoder that made the vectors, where it is known."""
        ...

    @property
    def shards_folder(self) -> Path | None:
        """The pictures behind the vectors, where they are known."""
        ...

    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids in the order of the blocks; unique, not negative."""
        ...

    def blocks(self) -> Iterator[VectorBlock]:
        """All vectors, finite, block by block, in bounded memory."""
        ...

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> pa.Table:
        """One row for each of `ids`, in their order."""
        ...

    def check(self) -> None:
        """Raises ArtifactError where the files are not what they were when they were made."""
        ...
