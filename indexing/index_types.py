"""Index types by name: `Flat`, `IVF<partitions>,<codec>`, `HNSW<links>[,SQ8]`.

Every version keeps its vectors beside the index (`vector_store.py`), so a codec only has to bring good candidates:
they are scored exactly afterwards. `Flat` is that store alone.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from lookalike.errors import SettingsError
from lookalike.native_libraries import load_faiss

Codec = Literal["Flat", "SQfp16", "SQ8", "RaBitQ"]

_IVF_NAME = re.compile(r"IVF([2-9]|[1-9]\d+),(Flat|SQfp16|SQ8|RaBitQ)")
_HNSW_NAME = re.compile(r"HNSW([2-9]|[1-9]\d+)(?:,(Flat|SQ8))?")
# Of RaBitQ, two factors per vector beside its bits.
_RABITQ_FACTORS_BYTES = 8


@dataclass(frozen=True, slots=True)
class IndexType:
    """One way to find candidates."""

    family: Literal["flat", "ivf", "hnsw"]
    codec: Codec = "Flat"
    num_partitions: int = 1  # of an IVF type
    num_links: int = 0  # of an HNSW type, per vector and level

    @classmethod
    def parse(cls, name: str) -> "IndexType":
        """Raises SettingsError for a name that is not one of ours."""
        if name == "Flat":
            return cls("flat")
        if match := _IVF_NAME.fullmatch(name):
            return cls("ivf", codec=match.group(2), num_partitions=int(match.group(1)))  # type: ignore[arg-type]
        if match := _HNSW_NAME.fullmatch(name):
            return cls("hnsw", codec=match.group(2) or "Flat", num_links=int(match.group(1)))  # type: ignore[arg-type]
        raise SettingsError(
            f"type: {name!r} is not one of auto, Flat, IVF<partitions>,<Flat|SQfp16|SQ8|RaBitQ>, HNSW<links>[,SQ8]."
        )

    @property
    def name(self) -> str:
        if self.family == "flat":
            return "Flat"
        if self.family == "ivf":
            return f"IVF{self.num_partitions},{self.codec}"
        return f"HNSW{self.num_links}" + (f",{self.codec}" if self.codec != "Flat" else "")

    def code_bytes(self, dim: int) -> int:
        """Bytes of one vector's code."""
        return {
            "Flat": 4 * dim,
            "SQfp16": 2 * dim,
            "SQ8": dim,
            "RaBitQ": (dim + 7) // 8 + _RABITQ_FACTORS_BYTES,
        }[self.codec]


def create_untrained(index_type: IndexType, dim: int, *, seed: int) -> Any:
    """An empty FAISS index of inner products; `Flat` has none.

    Raises:
        ValueError: the type is `Flat`.
    """
    faiss = load_faiss()
    if index_type.family == "flat":
        raise ValueError("Flat needs no FAISS index")
    if index_type.family == "hnsw":
        codec = "Flat" if index_type.codec == "Flat" else index_type.codec
        return faiss.index_factory(dim, f"HNSW{index_type.num_links},{codec}", faiss.METRIC_INNER_PRODUCT)
    index = faiss.index_factory(dim, f"IVF{index_type.num_partitions},{index_type.codec}", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.spherical = True
    return index
