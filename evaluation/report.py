"""An evaluation on disk: numbers, values per query, and a report that opens without a network."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from data_pipelines.decode import decode_image
from data_pipelines.shard_set import ShardSet
from evaluation.bootstrap import Estimate
from evaluation.leave_one_out import LeaveOneOutResult, paired_difference
from lookalike.artifacts import (
    Manifest,
    fingerprint,
    publishing,
    read_manifest,
    verify_files,
    versions,
    write_manifest,
)
from lookalike.errors import ArtifactError, ChecksumMismatch

EVALUATION_KIND = "evaluation"
EVALUATION_VERSION = 1
REPORT_NAME = "report.html"
PER_QUERY_NAME = "per_query.parquet"
_RESULT_NAME = "result.json"
_NUM_EXAMPLES = 12
_NUM_SHOWN = 8
_THUMBNAIL_SIDE = 128  # pixels; shown at up to 96


@dataclass(frozen=True)
class Contender:
    """One way of embedding the same pictures, and how it did."""

    name: str
    result: LeaveOneOutResult
    provenance: Mapping[str, Any]  # fingerprints of what made the vectors


def summarise(contenders: Sequence[Contender]) -> dict[str, Any]:
    """Numbers as plain JSON: per contender each metric's mean and interval, and the last one's lead over the others."""
    *others, last = contenders
    return {
        "protocol": "leave-one-out",
        "intervals": "95%, bootstrap over classes",
        "num_queries": len(last.result.query_ids),
        "num_gallery": last.result.num_gallery,
        "num_alone_in_their_class": last.result.num_alone,
        "ground_truth": fingerprint([last.result.query_ids.tolist(), last.result.query_labels.tolist()]),
        "contenders": {
            contender.name: {
                "metrics": {name: _rounded(value) for name, value in contender.result.estimates().items()},
                "provenance": dict(contender.provenance),
            }
            for contender in contenders
        },
        "lead": {
            f"{last.name} over {other.name}": {
                metric: _rounded(paired_difference(last.result, other.result, metric))
                for metric in last.result.per_query
            }
            for other in others
        },
    }


def table_lines(summary: Mapping[str, Any]) -> list[str]:
    """The numbers as text, for the terminal."""
    contenders = summary["contenders"]
    metrics = list(next(iter(contenders.values()))["metrics"])
    width = max(map(len, contenders))
    about = (
        f"{summary['num_queries']} queries, {summary['num_gallery']} in the gallery; brackets: {summary['intervals']}"
    )
    lines = [about, f"{'':<{width}}  " + "  ".join(f"{metric:^19}" for metric in metrics)]
    for name, entry in contenders.items():
        cells = [f"{m['mean']:.3f} {_interval(m, '{:.3f}')}" for m in entry["metrics"].values()]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:^19}" for cell in cells))
    lines += [
        f"{name}: R@1 {lead['R@1']['mean']:+.3f} {_interval(lead['R@1'], '{:+.3f}')}"
        for name, lead in summary["lead"].items()
        if "R@1" in lead
    ]
    return lines


def read_evaluation(folder: Path, *, parents: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The numbers of an evaluation that was made from these parents with these settings, or None."""
    try:
        manifest = read_manifest(folder, kind=EVALUATION_KIND, newest_version=EVALUATION_VERSION)
    except ArtifactError:
        return None
    if dict(manifest.parents) != dict(parents) or dict(manifest.settings) != dict(settings):
        return None
    try:
        verify_files(folder, manifest)
    except ChecksumMismatch:
        return None  # somebody removed or edited a file: make it anew
    summary: dict[str, Any] = json.loads((folder / _RESULT_NAME).read_text(encoding="utf-8"))
    return summary


def require_replaceable(folder: Path) -> None:
    """Raises ArtifactError if `folder` exists and is anything but an evaluation."""
    if folder.exists():
        read_manifest(folder, kind=EVALUATION_KIND, newest_version=EVALUATION_VERSION)


def write_evaluation(
    folder: Path,
    contenders: Sequence[Contender],
    shard_set: ShardSet,
    *,
    parents: Mapping[str, str],
    settings: Mapping[str, Any],
    title: str,
    command: str,
) -> dict[str, Any]:
    """Publishes numbers, values per query and the report at `folder`, in place of an older evaluation there.

    The caller has made sure that nothing else is lost there: see `require_replaceable`.
    """
    summary = summarise(contenders)
    with publishing(folder, replace=True) as temporary:
        (temporary / _RESULT_NAME).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        pq.write_table(_per_query_table(contenders), temporary / PER_QUERY_NAME)
        page = _render(contenders, shard_set, summary, title=title, command=command)
        (temporary / REPORT_NAME).write_text(page, encoding="utf-8")
        details = {"ground_truth": summary["ground_truth"], "num_queries": summary["num_queries"]}
        write_manifest(temporary, Manifest(EVALUATION_KIND, EVALUATION_VERSION, parents, details, settings))
    return summary


def _render(
    contenders: Sequence[Contender], shard_set: ShardSet, summary: Mapping[str, Any], *, title: str, command: str
) -> str:
    environment = Environment(
        loader=PackageLoader("evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        title=title,
        command=command,
        interval=_interval,
        summary=summary,
        examples=_examples(contenders, shard_set),
        versions=versions(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _examples(contenders: Sequence[Contender], shard_set: ShardSet) -> list[dict[str, Any]]:
    """Queries where the last contender does best, worst, and in between, with the start of everybody's ranking."""
    last = contenders[-1].result
    order = np.argsort(last.per_query["MAP@R"], kind="stable")
    positions = np.unique(np.linspace(0, len(order) - 1, _NUM_EXAMPLES).round().astype(int))
    examples = []
    for position in order[positions][::-1]:
        rankings = []
        for contender in contenders:
            shown = contender.result.ranked_ids[position, :_NUM_SHOWN]
            pictures = [_picture(shard_set, int(row), int(last.query_labels[position])) for row in shown if row >= 0]
            rankings.append({"name": contender.name, "pictures": pictures})
        query = _picture(shard_set, int(last.query_ids[position]), int(last.query_labels[position]))
        examples.append({"query": query, "rankings": rankings, "map_at_r": float(last.per_query["MAP@R"][position])})
    return examples


def _picture(shard_set: ShardSet, row: int, query_label: int) -> dict[str, Any]:
    sample = shard_set.samples.slice(row, 1).to_pylist()[0]
    thumbnail = decode_image(shard_set.read_bytes(row), limits=shard_set.decode_limits)
    thumbnail.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    encoded = io.BytesIO()
    thumbnail.save(encoded, format="JPEG", quality=85)
    return {
        "name": sample["class_name"] or sample["key"],
        "source": f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}",
        "is_relevant": sample["label"] == query_label,
    }


def _per_query_table(contenders: Sequence[Contender]) -> pa.Table:
    tables = []
    for contender in contenders:
        result = contender.result
        columns: dict[str, Any] = {
            "contender": pa.array([contender.name] * len(result.query_ids)),
            "query_id": result.query_ids,
            "label": result.query_labels,
            **result.per_query,
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _rounded(estimate: Estimate) -> dict[str, float | None]:
    """Bounds that are not known are null: JSON has no NaN."""
    return {name: None if np.isnan(value) else round(value, 4) for name, value in asdict(estimate).items()}


def _interval(value: Mapping[str, float | None], form: str) -> str:
    """Such as `[0.61, 0.66]`; a question mark where nothing is known about other classes."""
    low, high = (form.format(bound) if bound is not None else "?" for bound in (value["low"], value["high"]))
    return f"[{low}, {high}]"
