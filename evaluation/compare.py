"""Two results of the same queries, compared query by query: what `lookalike evaluate compare` prints."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bootstrap import bootstrap_means
from evaluation.record import UNKNOWN
from evaluation.result import Result, Section, read_result, rounded
from lookalike.errors import DataError, ManifestMismatch

RESULT_NAME = "result.json"
_ROUNDING = 1e-12
# Fields of the record that decide what a number means, whoever made the vectors.
_RECORDED = ("protocol", "num_distractors", "ties", "crop", "similarity")


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one metric over the queries that both results have a value for; in percent."""

    before: float
    after: float
    difference: float  # after - before
    low: float  # of its 95% interval over clusters of queries
    high: float
    wins: int  # queries that got better
    losses: int

    def as_json(self) -> dict[str, Any]:
        numbers = {name: rounded(value) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return {**numbers, "is_within_noise": self.is_within_noise}

    @property
    def is_within_noise(self) -> bool:
        """Whether the interval reaches 0, or is not known."""
        return not (self.low > 0 or self.high < 0)


def open_result(path: Path) -> Result:
    """The JSON of a result, or that in the folder of a report.

    Raises:
        DataError: `path` is neither.
    """
    return read_result(path / RESULT_NAME if path.is_dir() else path)


def differences(before: Section, after: Section) -> dict[str, Difference]:
    """Of each metric that both have, paired by query.

    Raises:
        ManifestMismatch: the queries are not the same.
    """
    if before.query_names != after.query_names:
        raise ManifestMismatch(
            f"one result has {len(before.query_names)} queries, the other {len(after.query_names)}, and their names "
            "differ; only values of the same queries can be paired."
        )
    found = {}
    for name in (name for name in before.per_query if name in after.per_query):
        both = ~np.isnan(before.per_query[name]) & ~np.isnan(after.per_query[name])
        if not both.any():
            continue
        first, second = before.per_query[name][both], after.per_query[name][both]
        # A value that went through JSON in percent may differ by a rounding.
        second = np.where(np.isclose(first, second, rtol=0, atol=_ROUNDING), first, second)
        estimate = bootstrap_means((second - first)[:, None], after.clusters[both])[0]
        found[name] = Difference(
            before=100 * float(first.mean()),
            after=100 * float(second.mean()),
            difference=100 * estimate.mean,
            low=100 * estimate.low,
            high=100 * estimate.high,
            wins=int((second > first).sum()),
            losses=int((second < first).sum()),
        )
    return found


def compare_results(before: Result, after: Result) -> dict[str, dict[str, Difference]]:
    """Section -> metric -> difference, for all that both results have.

    Raises:
        ManifestMismatch: they are of different benchmarks, ground truth or queries.
        DataError: they have nothing in common.
    """
    for name, own, other in (
        ("benchmark", before.benchmark, after.benchmark),
        ("ground truth", before.record.get("ground_truth"), after.record.get("ground_truth")),
    ):
        if own != other:
            raise ManifestMismatch(
                f"the results are of different {name}: {own} and {other}; only the same queries can be paired."
            )
    common = [name for name in before.sections if name in after.sections]
    if not common:
        raise DataError(f"the results share no section: {list(before.sections)} and {list(after.sections)}.")
    return {name: differences(before.sections[name], after.sections[name]) for name in common}


def compare(before: Path, after: Path) -> tuple[dict[str, Any], list[str]]:
    """`compare_results` of two files or folders, as JSON and as lines of text."""
    first, second = open_result(before), open_result(after)
    found = compare_results(first, second)
    tree = {section: {name: own.as_json() for name, own in metrics.items()} for section, metrics in found.items()}
    return {
        "before": str(before),
        "after": str(after),
        "sections": tree,
        "remarks": remarks(first, second),
    }, comparison_lines(first, second)


def comparison_lines(before: Result, after: Result, *, only: Sequence[str] | None = None) -> list[str]:
    """The differences of `only` some metrics, or of all, and what stands against comparing."""
    found = compare_results(before, after)
    lines = [line for section, metrics in found.items() for line in difference_lines(section, metrics, only=only)]
    return [*lines, *remarks(before, after)]


def remarks(before: Result, after: Result) -> list[str]:
    """Sentences on what was not compared, and on what was measured differently."""
    found = []
    for name in dict.fromkeys([*before.sections, *after.sections]):
        if name not in before.sections or name not in after.sections:
            found.append(f"not compared: section {name} is in one of the results only")
            continue
        first, second = before.sections[name], after.sections[name]
        for metric in dict.fromkeys([*first.per_query, *first.bounds, *second.per_query, *second.bounds]):
            bounded = [side for side, own in (("before", first), ("after", second)) if metric in own.bounds]
            if bounded:
                found.append(f"not compared: {name} {metric} is only bounded {' and '.join(bounded)}")
            elif metric not in first.per_query or metric not in second.per_query:
                found.append(f"not compared: {name} {metric} is in one of the results only")
    for field in _RECORDED:
        own, other = before.record.get(field, UNKNOWN), after.record.get(field, UNKNOWN)
        if own != other and UNKNOWN not in (own, other):
            found.append(f"measured differently: {field.replace('_', ' ')} {own} before, {other} after")
    return found


def difference_lines(section: str, metrics: dict[str, Difference], *, only: Sequence[str] | None = None) -> list[str]:
    """A line per metric: values, difference with its interval, wins and losses, and whether it is within noise."""
    shown = {f"{section} {name}": own for name, own in metrics.items() if only is None or name in only}
    width = max(map(len, shown), default=0)
    return [
        f"{name:<{width}}  {own.before:6.2f} -> {own.after:6.2f}  {own.difference:+.2f} "
        f"[{_bound(own.low)}, {_bound(own.high)}]  {own.wins:,} won, {own.losses:,} lost"
        + ("  within noise" if own.is_within_noise else "")
        for name, own in shown.items()
    ]


def _bound(percent: float) -> str:
    """A question mark where nothing is known about other clusters."""
    return "?" if math.isnan(percent) else f"{percent:+.2f}"
