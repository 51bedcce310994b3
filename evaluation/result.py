"""What an evaluation found: values of every query under every metric, how they were measured, and all that as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from evaluation.bootstrap import Estimate, bootstrap_means
from lookalike.artifacts import write_text_atomically
from lookalike.errors import DataError

RESULT_FORMAT = 1


@dataclass(frozen=True)
class Section:
    """One protocol or difficulty of a benchmark. Values lie in [0, 1]; NaN where a query has none."""

    query_names: tuple[str, ...]
    clusters: Int64[ndarray, "queries"]  # queries that err together: of one class, of one landmark
    per_query: Mapping[str, Float64[ndarray, "queries"]]  # metric -> values
    # Metrics that a list of the first k does not decide for every query: the least and the greatest value.
    bounds: Mapping[str, Float64[ndarray, "queries 2"]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # plain JSON: counts, tie gap in percent

    def mean(self, metric: str) -> float:
        """Over the queries that have a value; NaN where none has."""
        return mean_of_known(self.per_query[metric])

    def estimates(self, *, by_cluster: bool) -> dict[str, Estimate]:
        """Means with 95% bootstrap intervals, over queries or over clusters; metrics without any value are left out."""
        names = [name for name, values in self.per_query.items() if not np.isnan(values).all()]
        if not names:
            return {}
        clusters = self.clusters if by_cluster else np.arange(len(self.clusters))
        columns = np.stack([self.per_query[name] for name in names], axis=1)
        return dict(zip(names, bootstrap_means(columns, clusters), strict=True))


@dataclass(frozen=True)
class CurvePoint:
    """Mean average precision among the first so many distractors."""

    num_distractors: int
    maps: Mapping[str, float]  # section -> mAP in [0, 1]


@dataclass(frozen=True)
class Result:
    benchmark: str
    sections: Mapping[str, Section]
    record: Mapping[str, Any]  # the protocol, see `evaluation.record`
    warnings: Sequence[str] = ()  # what makes the numbers doubtful
    curve: Sequence[CurvePoint] = ()


def mean_of_known(values: Float64[ndarray, "queries"]) -> float:
    """Over the values that are not NaN; NaN where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def result_tree(result: Result) -> dict[str, Any]:
    """Plain JSON, means and values per query in percent; null where a value is not known.

    A metric that is only bounded is null, and `bounds` holds its least and greatest mean: a reader who does not look
    for bounds finds no number instead of a wrong one.
    """
    return {
        "format": RESULT_FORMAT,
        "benchmark": result.benchmark,
        **{name: _section_tree(section) for name, section in result.sections.items()},
        "sections": list(result.sections),
        "curve": [
            {"num_distractors": point.num_distractors, **{name: rounded(_percent(v)) for name, v in point.maps.items()}}
            for point in result.curve
        ],
        "warnings": list(result.warnings),
        "record": dict(result.record),
    }


def _section_tree(section: Section) -> dict[str, Any]:
    known = {name: rounded(_percent(section.mean(name))) for name in section.per_query}
    intervals: dict[str, dict[str, list[float | None]]] = {name: {} for name in section.per_query}
    # Queries that occur once per seed do not err apart, so counting each alone would narrow the interval.
    kinds = ("by_cluster",) if "num_seeds" in section.facts else ("by_query", "by_cluster")
    for kind in kinds:
        for name, estimate in section.estimates(by_cluster=kind == "by_cluster").items():
            intervals[name][kind] = [rounded(_percent(bound)) for bound in (estimate.low, estimate.high)]
    per_query = {name: [_percent(v) for v in values.tolist()] for name, values in section.per_query.items()}
    tree: dict[str, Any] = {
        **known,
        **dict.fromkeys(section.bounds, None),
        **_without_nan(section.facts),
        "num_queries": num_queries(section),
        "intervals": intervals,
        "bounds": {
            name: [rounded(_percent(mean_of_known(values[:, side]))) for side in (0, 1)]
            for name, values in section.bounds.items()
        },
        "queries": list(section.query_names),
        "clusters": section.clusters.tolist(),
        "per_query": per_query,
        "per_query_bounds": {
            name: [[_percent(low), _percent(high)] for low, high in values.tolist()]
            for name, values in section.bounds.items()
        },
    }
    if "map" in per_query:
        tree["aps"] = dict(zip(section.query_names, per_query["map"], strict=True))
    return tree


def _without_nan(value: Any) -> Any:
    """Facts as JSON allows them."""
    if isinstance(value, Mapping):
        return {name: _without_nan(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def num_queries(section: Section) -> int:
    """Queries that have a value: one without a relevant picture has none."""
    columns = [*section.per_query.values(), *(values[:, 0] for values in section.bounds.values())]
    return int((~np.isnan(columns[0])).sum()) if columns else 0


def summary_tree(result: Result) -> dict[str, Any]:
    """`result_tree` without the values per query."""
    tree = result_tree(result)
    for name in result.sections:
        tree[name] = {key: value for key, value in tree[name].items() if key not in _PER_QUERY_KEYS}
    return tree


def write_result(file: Path, result: Result) -> None:
    write_text_atomically(file, json.dumps(result_tree(result), indent=1, allow_nan=False) + "\n")


def read_result(file: Path) -> Result:
    """Raises DataError where `file` is not the JSON of a result."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["format"] > RESULT_FORMAT:
            raise DataError(f"{file} has format {tree['format']}; this program reads up to {RESULT_FORMAT}.")
        return Result(
            benchmark=str(tree["benchmark"]),
            sections={name: _read_section(tree[name]) for name in tree["sections"]},
            record=dict(tree["record"]),
            warnings=tuple(tree["warnings"]),
            curve=tuple(_read_point(point) for point in tree["curve"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not the result of an evaluation ({type(error).__name__}: {error}).") from error


_PER_QUERY_KEYS = ("queries", "clusters", "per_query", "per_query_bounds", "aps")
_SECTION_KEYS = ("num_queries", "intervals", "bounds", *_PER_QUERY_KEYS)


def _read_section(tree: Mapping[str, Any]) -> Section:
    per_query = {name: _fractions(values) for name, values in tree["per_query"].items()}
    bounds = {name: _fractions(values).reshape(-1, 2) for name, values in tree["per_query_bounds"].items()}
    known = {*_SECTION_KEYS, *per_query, *bounds}
    queries, clusters = tuple(map(str, tree["queries"])), np.array(tree["clusters"], np.int64)
    if any(len(values) != len(queries) for values in (clusters, *per_query.values(), *bounds.values())):
        raise ValueError(f"values for {len(queries)} queries have other lengths")
    facts = {name: value for name, value in tree.items() if name not in known}
    return Section(queries, clusters, per_query, bounds, facts)


def _read_point(tree: Mapping[str, Any]) -> CurvePoint:
    maps = {name: float(_fractions([value])[0]) for name, value in tree.items() if name != "num_distractors"}
    return CurvePoint(int(tree["num_distractors"]), maps)


def _percent(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else 100 * float(value)


def rounded(percent: float | None) -> float | None:
    """To ten decimals, so that a mean of values that went through JSON, and lost a last bit there, is the same mean."""
    return None if percent is None or math.isnan(percent) else round(percent, 10)


def _fractions(values: Sequence[Any]) -> Float64[ndarray, "..."]:
    return np.array(values, dtype=np.float64) / 100


def table_lines(result: Result) -> list[str]:
    """The numbers as text, a row per metric and a column per section, then what makes them doubtful."""
    sections = result.sections.values()
    estimates = [section.estimates(by_cluster=True) for section in sections]
    metrics = list(dict.fromkeys(name for section in sections for name in (*section.per_query, *section.bounds)))
    width = max(len(name) for name in ("queries", *metrics))
    lines = [" ".join([f"{'':<{width}}", *(f"{name:>22}" for name in result.sections)])]
    for metric in metrics:
        cells = [cell(section, own, metric) for section, own in zip(sections, estimates, strict=True)]
        lines.append(" ".join([f"{metric:<{width}}", *(f"{text:>22}" for text in cells)]))
    if all(section.facts.get("tie_gap") is not None for section in sections):
        lines.append(" ".join([f"{'tie gap':<{width}}", *(f"{_map_gap(section):>22.3f}" for section in sections)]))
    lines.append(" ".join([f"{'queries':<{width}}", *(f"{num_queries(section):>22,}" for section in sections)]))
    for name, section in result.sections.items():
        numbers = {key: value for key, value in section.facts.items() if isinstance(value, int | float)}
        told = [f"{key} {value:,.6g}" for key, value in numbers.items() if key != "tie_gap"]
        lines += [f"{name}: {', '.join(told)}"] if told else []
    if len(result.curve) > 1:
        lines.append("map by number of distractors:")
        lines += [
            " ".join(
                [f"{point.num_distractors:>{width},}", *(f"{100 * value:>22.2f}" for value in point.maps.values())]
            )
            for point in result.curve
        ]
    return [*lines, *(f"warning: {warning}" for warning in result.warnings)]


def _map_gap(section: Section) -> float:
    """Percent between the optimistic and the pessimistic order of equal scores."""
    gap = section.facts["tie_gap"]
    return float(gap["map"] if isinstance(gap, Mapping) else gap)


def cell(section: Section, estimates: Mapping[str, Estimate], metric: str) -> str:
    """`71.20 [68.10, 74.00]` in percent, or `41.20 to 43.90` where a metric is only bounded."""
    if metric in section.bounds:
        low, high = (100 * mean_of_known(section.bounds[metric][:, side]) for side in (0, 1))
        return f"{low:.2f} to {high:.2f}"
    if metric not in estimates:
        return "no value"
    estimate = estimates[metric]
    if math.isnan(estimate.low):
        return f"{100 * estimate.mean:.2f}"
    return f"{100 * estimate.mean:.2f} [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"
