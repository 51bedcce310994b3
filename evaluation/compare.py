"""Two evaluations of the same queries, compared query by query: what `lookalike evaluate compare` prints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64
from numpy import ndarray

from evaluation.bootstrap import bootstrap_mean
from evaluation.report import EVALUATION_KIND, EVALUATION_VERSION, PER_QUERY_NAME
from evaluation.revisited.ground_truth import SETUPS
from lookalike.artifacts import read_manifest
from lookalike.errors import DataError, ManifestMismatch


@dataclass(frozen=True)
class PerQueryValues:
    """Values of every query under several metrics; NaN where a query has none."""

    ground_truth: str  # fingerprint
    clusters: Int64[ndarray, "queries"]  # queries that err together
    values: dict[str, Float64[ndarray, "queries"]]  # metric -> values, in the order of the queries' names


def compare(before: Path, after: Path) -> tuple[dict[str, Any], list[str]]:
    """The paired difference `after - before` of each common metric, with its 95% interval, wins and losses.

    Args:
        before: The folder of an evaluation (its last contender counts), or the JSON file of `evaluate descriptors`.
        after: Likewise, of the same queries.

    Raises:
        ManifestMismatch: they were measured on different ground truth.
        DataError: a file is something else.
    """
    first, second = read_per_query(before), read_per_query(after)
    if first.ground_truth != second.ground_truth:
        raise ManifestMismatch(
            f"{before} was measured on ground truth {first.ground_truth[:12]}, {after} on {second.ground_truth[:12]}; "
            "only values of the same queries can be paired."
        )
    metrics = {}
    for name in [name for name in first.values if name in second.values]:
        difference = second.values[name] - first.values[name]
        counted = difference[~np.isnan(difference)]
        estimate = bootstrap_mean(difference, first.clusters)
        metrics[name] = {
            "before": float(np.nanmean(first.values[name])),
            "after": float(np.nanmean(second.values[name])),
            "difference": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
            "wins": int((counted > 0).sum()),
            "losses": int((counted < 0).sum()),
            "is_within_noise": not (estimate.low > 0 or estimate.high < 0),
        }
    return {"before": str(before), "after": str(after), "metrics": metrics}, _lines(metrics)


def read_per_query(path: Path) -> PerQueryValues:
    """Raises DataError or ArtifactError where `path` is neither kind of result."""
    return _of_folder(path) if path.is_dir() else _of_descriptors(path)


def _of_folder(folder: Path) -> PerQueryValues:
    manifest = read_manifest(folder, kind=EVALUATION_KIND, newest_version=EVALUATION_VERSION)
    table = pq.read_table(folder / PER_QUERY_NAME)
    last = table["contender"][-1]
    table = table.filter(pc.equal(table["contender"], last)).sort_by("query_id")
    metrics = [name for name in table.column_names if name not in ("contender", "query_id", "label")]
    return PerQueryValues(
        ground_truth=manifest.details["ground_truth"],
        clusters=table["label"].to_numpy(),
        values={name: table[name].to_numpy() for name in metrics},
    )


def _of_descriptors(file: Path) -> PerQueryValues:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        queries = sorted(tree[SETUPS[0]]["aps"])
        values = {
            f"mAP {setup}": np.array([_fraction(tree[setup]["aps"][query]) for query in queries]) for setup in SETUPS
        }
        ground_truth = str(tree["record"]["ground_truth_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a result of `lookalike evaluate descriptors`: {error!r}.") from error
    return PerQueryValues(ground_truth, np.arange(len(queries)), values)


def _fraction(percent: float | None) -> float:
    return float("nan") if percent is None else percent / 100


def _lines(metrics: dict[str, dict[str, Any]]) -> list[str]:
    width = max(map(len, metrics), default=0)
    return [
        f"{name:<{width}}  {m['before']:.4f} -> {m['after']:.4f}  {m['difference']:+.4f} "
        f"[{m['low']:+.4f}, {m['high']:+.4f}]  {m['wins']} won, {m['losses']} lost"
        + ("  within noise" if m["is_within_noise"] else "")
        for name, m in metrics.items()
    ]
