"""The table that people quote: a row per contender or published method, a column per section and headline metric."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.bootstrap import Estimate
from evaluation.reporting.values import Contender
from evaluation.result import Result, Section, mean_of_known


@dataclass(frozen=True, slots=True)
class Column:
    section: str
    metric: str

    @property
    def label(self) -> str:
        """The metric as papers write it; a hit rate says that it is one, since papers call it recall."""
        name, _, at = self.metric.partition("@")
        if name == "hit_rate":
            return f"R@{at} (hit rate)"
        if self.metric == "map@r":
            return "MAP@R"
        written = {"map": "mAP", "mp": "mP", "mr": "mR"}.get(name, name)
        return f"{written}@{at}" if at else written


@dataclass(frozen=True, slots=True)
class Value:
    """In percent."""

    mean: float  # NaN where the metric is only bounded
    low: float  # of the 95% interval, or the lower bound; NaN where not known
    high: float

    @property
    def is_bounded_only(self) -> bool:
        return math.isnan(self.mean)

    @property
    def number(self) -> str:
        """`68.3`, or `41.2 to 43.9` where the metric is only bounded."""
        return f"{self.low:.1f} to {self.high:.1f}" if self.is_bounded_only else f"{self.mean:.1f}"

    @property
    def interval(self) -> str:
        """`[60.1, 76.0]`, or nothing where none is known."""
        return "" if self.is_bounded_only or math.isnan(self.low) else f"[{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    values: Mapping[Column, Value]
    source: str | None = None  # of a published row; None where it was measured

    @property
    def is_published(self) -> bool:
        return self.source is not None


def headline_columns(result: Result) -> list[Column]:
    """Section by section: mAP and mP@10 of landmarks, hit rates and MAP@R of classes, else all metrics."""
    return [Column(name, metric) for name, section in result.sections.items() for metric in headline_metrics(section)]


def headline_metrics(section: Section) -> list[str]:
    metrics = list(dict.fromkeys((*section.per_query, *section.bounds)))
    if "mp@10" in metrics:
        chosen = ["map", "mp@10"]
    elif hit_rates := [metric for metric in metrics if metric.startswith("hit_rate@")]:
        chosen = [*hit_rates, "map@r"]
    else:
        chosen = metrics
    return [metric for metric in chosen if metric in metrics]


def main_columns(columns: Sequence[Column]) -> list[Column]:
    """Those worth a figure: all of a single section, else the first of each."""
    first_of_section = {column.section: column for column in reversed(columns)}
    return [column for column in columns if len(first_of_section) == 1 or column is first_of_section[column.section]]


def measured_row(contender: Contender, columns: Sequence[Column]) -> Row:
    """Values that the contender lacks are left out."""
    values: dict[Column, Value] = {}
    for name, section in contender.result.sections.items():
        own = [column for column in columns if column.section == name]
        estimates = section.estimates(by_cluster=True) if own else {}
        found = {column: _value(section, estimates, column.metric) for column in own}
        values |= {column: value for column, value in found.items() if value is not None}
    return Row(contender.name, values)


def _value(section: Section, estimates: Mapping[str, Estimate], metric: str) -> Value | None:
    if metric in section.bounds:
        low, high = (100 * mean_of_known(section.bounds[metric][:, side]) for side in (0, 1))
        return None if math.isnan(low) else Value(math.nan, low, high)
    if metric not in estimates:
        return None
    estimate = estimates[metric]
    return Value(100 * estimate.mean, 100 * estimate.low, 100 * estimate.high)
