"""What papers report on a benchmark: rows of `published_results.yaml`."""

import math
from importlib import resources
from typing import Any

import yaml

from evaluation.reporting.headlines import Column, Row, Value
from evaluation.result import Result

# The set of a million distractors lost and gained a few pictures over time.
_A_MILLION = range(950_000, 1_050_001)


def published_benchmark(result: Result) -> str | None:
    """The benchmark's name in the file; None with another number of distractors than papers use."""
    num_distractors = result.record.get("num_distractors") or 0
    if num_distractors in _A_MILLION:
        return f"{result.benchmark}+r1m"
    return result.benchmark if num_distractors == 0 else None


def published_rows(benchmark: str | None) -> list[Row]:
    """The rows of a benchmark, none where nothing is known of it."""
    tree = _read()
    return [_row(entry, tree["sources"]) for entry in tree["benchmarks"].get(benchmark, [])]


def published_benchmarks() -> list[str]:
    return list(_read()["benchmarks"])


def _read() -> dict[str, Any]:
    text = resources.files("evaluation").joinpath("published_results.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree


def _row(entry: dict[str, Any], sources: dict[str, str]) -> Row:
    values = {
        Column(section, metric): Value(float(percent), math.nan, math.nan)
        for section, metrics in entry.items()
        if section not in ("name", "source")
        for metric, percent in metrics.items()
    }
    return Row(entry["name"], values, sources[entry["source"]])
