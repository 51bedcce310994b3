"""The measured recall of an index at several efforts: how a wish for recall becomes search parameters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lookalike.records import Effort


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """What one effort finds."""

    effort: Effort
    recall: float  # share of the exact k nearest that are found, mean over held-out queries


@dataclass(frozen=True, slots=True)
class RecallCurve:
    """Points in ascending order of effort; empty for an index that is always searched exactly."""

    points: tuple[RecallPoint, ...] = ()

    def effort_for(self, recall: float) -> Effort | None:
        """The least effort measured to find the share `recall`; None where only exact search does."""
        if recall >= 1:
            return None  # a sample of queries cannot promise that nothing is ever missed
        return next((point.effort for point in self.points if point.recall >= recall), None)

    def to_list(self) -> list[dict[str, Any]]:
        """For a manifest: `[{"effort": {...}, "recall": 0.99}, ...]`."""
        return [{"effort": effort_to_tree(point.effort), "recall": point.recall} for point in self.points]

    @classmethod
    def from_list(cls, tree: Iterable[Mapping[str, Any]]) -> "RecallCurve":
        """The inverse of `to_list`."""
        return cls(tuple(RecallPoint(Effort(**point["effort"]), float(point["recall"])) for point in tree))


@dataclass(frozen=True, slots=True)
class MeasuredDepth:
    """What was measured for lists of one length, and the effort that reaches the recall the index was built for."""

    depth: int
    curve: RecallCurve
    default_effort: Effort

    def to_tree(self) -> dict[str, Any]:
        """For a manifest; `from_tree` is the inverse."""
        return {
            "depth": self.depth,
            "recall_curve": self.curve.to_list(),
            "default_effort": effort_to_tree(self.default_effort),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "MeasuredDepth":
        curve = RecallCurve.from_list(tree["recall_curve"])
        return cls(int(tree["depth"]), curve, Effort(**tree["default_effort"]))


def measured_depths(details: Mapping[str, Any]) -> tuple[MeasuredDepth, ...]:
    """All that the manifest of an index says about its recall, ascending in depth."""
    first = MeasuredDepth.from_tree({**details, "depth": details["measured_depth"]})
    return (first, *map(MeasuredDepth.from_tree, details.get("deeper", ())))


def measured_for(k: int, depths: Sequence[MeasuredDepth]) -> MeasuredDepth:
    """What was measured for lists of k or, the next best, for longer ones; the deepest for lists longer than all.

    Near neighbours lie in the partitions visited first, so of two measured efforts that of the longer lists is the
    safer one in between. That is a rule of thumb, not a bound.
    """
    return next((measured for measured in depths if measured.depth >= k), depths[-1])


def effort_to_tree(effort: Effort) -> dict[str, int]:
    """Without the parts that the index type does not have; `Effort(**tree)` is the inverse."""
    return {name: value for name, value in asdict(effort).items() if value is not None}
