"""Single queries, the most instructive first: where the result lost most, or where it is worst."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.reporting.headlines import Column, headline_metrics
from evaluation.result import Result, Section


@dataclass(frozen=True, slots=True)
class QueryRow:
    """In percent; NaN where not known."""

    column: Column
    query: str
    low: float  # equal to `high` where the list of answers decides the value
    high: float
    before: float  # of the result that is compared with
    change: float

    @property
    def value(self) -> str:
        if math.isnan(self.low):
            return "no value"
        return f"{self.low:.1f}" if self.low == self.high else f"{self.low:.1f} to {self.high:.1f}"


def query_rows(result: Result, baseline: Result | None) -> list[QueryRow]:
    """All queries of all sections under each section's main metric: worst change first, then lowest value first."""
    rows = []
    for name, section in result.sections.items():
        metric = main_metric(section)
        if metric is not None:
            before = baseline.sections.get(name) if baseline else None
            rows += _rows_of_section(Column(name, metric), section, before)
    return sorted(rows, key=lambda row: (*_nan_last(row.change), *_nan_last(row.low)))


def main_metric(section: Section) -> str | None:
    """The first of mAP, MAP@R and the headline metrics whose values are known; else the first that is bounded."""
    wanted = ["map", "map@r", *headline_metrics(section)]
    return next((name for name in wanted if name in section.per_query), next(iter(section.bounds), None))


def query_ranges(section: Section, metric: str) -> list[tuple[float, float]]:
    """The least and the greatest value of every query, in percent."""
    if metric in section.bounds:
        return [(100 * low, 100 * high) for low, high in section.bounds[metric].tolist()]
    return [(100 * value, 100 * value) for value in section.per_query[metric].tolist()]


def _rows_of_section(column: Column, section: Section, before: Section | None) -> list[QueryRow]:
    own = query_ranges(section, column.metric)
    former: Sequence[float] = [math.nan] * len(own)
    if before is not None and column.metric in before.per_query:
        former = (100 * before.per_query[column.metric]).tolist()
    return [
        QueryRow(column, query, low, high, old, low - old if low == high else math.nan)
        for query, (low, high), old in zip(section.query_names, own, former, strict=True)
    ]


def _nan_last(value: float) -> tuple[bool, float]:
    """NaN compares with nothing, so it must not reach a sort."""
    return (True, 0.0) if math.isnan(value) else (False, value)
