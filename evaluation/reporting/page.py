"""One HTML file that opens from disk: styles, figures and pictures lie inside it, and it asks nobody for anything."""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evaluation.compare import Difference, compare_results
from evaluation.reporting import figures
from evaluation.reporting.headlines import Column, Row, main_columns
from evaluation.reporting.query_table import main_metric, query_ranges, query_rows
from evaluation.reporting.values import ConfusingPicture, Contender, Gallery, PrecisionRecall, ShownPicture
from evaluation.result import Result, num_queries

MAX_SHOWN_QUERIES = 500
_MARKS = {"query": "?", "relevant": "✓", "junk": "~", "unrelated": "✗"}


@dataclass(frozen=True, slots=True)
class Quotes:
    """The headline table as text, see `evaluation.reporting.rows`."""

    markdown: str
    latex: str


def render_page(
    own: Contender,
    baselines: Sequence[Contender],
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    title: str,
    command: str,
    quotes: Quotes,
    galleries: Sequence[Gallery] = (),
    confusing: Sequence[ConfusingPicture] = (),
    precision_recall: Sequence[PrecisionRecall] = (),
) -> str:
    """The page of a result; the same input gives the same text.

    Args:
        rows: Of the headline table: own, baselines, published.

    Raises:
        ManifestMismatch: a baseline was measured on other queries.
        DataError: a baseline has no section of the result.
    """
    result = own.result
    shown_columns = [column for column in main_columns(columns) if any(column in row.values for row in rows)]
    with_curve = any(len(contender.result.curve) > 1 for contender in (own, *baselines))
    paired = [(baseline.name, paired_rows(baseline.result, result, columns)) for baseline in baselines]
    queries = query_rows(result, baselines[0].result if baselines else None)
    groups = column_groups(columns, result)
    return (
        _environment()
        .get_template("evaluation.html")
        .render(
            title=title,
            command=command,
            summary=summary_line(result),
            protocol=result.record.get("protocol"),
            warnings=[
                *result.warnings,
                *(f"{other.name}: {text}" for other in baselines for text in other.result.warnings),
            ],
            columns=columns,
            column_groups=[
                (section, len(members), num_queries(result.sections[section])) for section, members in groups
            ],
            first_columns={members[0] for _, members in groups},
            rows=rows,
            has_bounds=any(value.is_bounded_only for row in rows for value in row.values.values()),
            bars=Markup(figures.interval_bars(shown_columns, rows)) if shown_columns else None,
            paired=paired,
            curve=Markup(figures.distractor_curve([own, *baselines])) if with_curve else None,
            curves=[contender for contender in (own, *baselines) if len(contender.result.curve) > 1],
            precision_recall=Markup(figures.precision_recall_curves(precision_recall)) if precision_recall else None,
            galleries=[(gallery, value_of_query(result, gallery)) for gallery in galleries],
            confusing=confusing,
            marks=_MARKS,
            baseline_name=baselines[0].name if baselines else None,
            queries=queries[:MAX_SHOWN_QUERIES],
            num_hidden_queries=max(0, len(queries) - MAX_SHOWN_QUERIES),
            record=list(flat_record(result.record)),
            quotes=quotes,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"picture_address": picture_address, "caption": caption, "signed": "{:+.1f}".format}
    environment.tests["known"] = lambda value: not math.isnan(value)
    return environment


def summary_line(result: Result) -> str:
    """Benchmark, queries, gallery and distractors, as far as they are known."""
    counts = {num_queries(section) for section in result.sections.values()} or {0}
    facts = [" to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) + " queries"]
    gallery = result.record.get("counts", {}).get("gallery", {}).get("found")
    for count, name in ((gallery, "gallery pictures"), (result.record.get("num_distractors"), "distractors")):
        if isinstance(count, int) and count:
            facts.append(f"{count:,} {name}")
    return f"Benchmark {result.benchmark}: {', '.join(facts)}"


def column_groups(columns: Sequence[Column], result: Result) -> list[tuple[str, list[Column]]]:
    """The columns by section."""
    members = {name: [column for column in columns if column.section == name] for name in result.sections}
    return [(name, own) for name, own in members.items() if own]


def paired_rows(before: Result, after: Result, columns: Sequence[Column]) -> list[tuple[Column, Difference]]:
    found = compare_results(before, _with_only(after, columns))
    return [
        (column, found[column.section][column.metric])
        for column in columns
        if column.metric in found.get(column.section, {})
    ]


def _with_only(result: Result, columns: Sequence[Column]) -> Result:
    """Without the metrics that are not shown: each one that is compared costs a bootstrap."""
    sections = {
        name: replace(
            section,
            per_query={m: values for m, values in section.per_query.items() if Column(name, m) in columns},
        )
        for name, section in result.sections.items()
    }
    return replace(result, sections=sections)


def value_of_query(result: Result, gallery: Gallery) -> str:
    """`mAP 12.3` of the gallery's query under its section's main metric; nothing where it has none."""
    section = result.sections.get(gallery.section)
    metric = main_metric(section) if section else None
    if section is None or metric is None or gallery.query.name not in section.query_names:
        return ""
    low, high = query_ranges(section, metric)[section.query_names.index(gallery.query.name)]
    label = Column(gallery.section, metric).label
    if math.isnan(low):
        return ""
    return f"{label} {low:.1f}" if low == high else f"{label} {low:.1f} to {high:.1f}"


def picture_address(picture: ShownPicture) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg or b'').decode()}"


def caption(picture: ShownPicture, place: int | None) -> str:
    """What an eye sees at a picture, in words."""
    parts = [f"place {place}"] * (place is not None) + [picture.kind, picture.name]
    if picture.score is not None:
        parts.append(f"score {picture.score:.3f}")
    return ", ".join(parts)


def flat_record(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of each leaf, the names of its branches before it."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            value = {str(number): part for number, part in enumerate(value, start=1)}
        if isinstance(value, Mapping) and value:
            yield from flat_record(value, f"{name} / ")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
