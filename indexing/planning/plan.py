"""What planning decides, and on what grounds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from indexing.index_types import IndexType
from lookalike.records import Effort


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One index type that was considered; predictions are for the whole collection on this machine."""

    type: str
    memory_bytes: int  # that searches keep occupied
    build_seconds: float  # training, assignment, encoding; wall time with this machine's cores
    milliseconds: float  # per query, in the mode that was asked for
    recall: float | None  # measured on held-out queries at `effort`; None where it was ruled out before any trial
    effort: Effort
    remark: str = ""  # which wish it breaks, or how it was measured


@dataclass(frozen=True, slots=True)
class Plan:
    """The index type to build, the effort that its trial needed, and everything that was compared."""

    index_type: IndexType
    effort: Effort  # expected; the finished index is measured again
    is_reachable: bool  # whether all wishes are kept
    table: tuple[CandidateRow, ...]
    explanation: tuple[str, ...]  # lines for people
    measurements: Mapping[str, Any]  # rates of this machine: depend on the clock

    def to_tree(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "index_type": self.index_type.name}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Plan":
        """What `to_tree` wrote."""
        return cls(
            index_type=IndexType.parse(tree["index_type"]),
            effort=Effort(**tree["effort"]),
            is_reachable=tree["is_reachable"],
            table=tuple(CandidateRow(**{**row, "effort": Effort(**row["effort"])}) for row in tree["table"]),
            explanation=tuple(tree["explanation"]),
            measurements=dict(tree["measurements"]),
        )
