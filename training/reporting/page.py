"""The report on runs: lines for a terminal and, as an artifact, one HTML file that asks nobody for anything."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lookalike.artifacts import Manifest, publishing, read_manifest, write_manifest
from training.reporting.comparison import (
    HEADINGS,
    RunComparison,
    RunRow,
    compare_runs,
    comparison_lines,
    settings_lines,
    table_lines,
)
from training.reporting.curves import curves_svg, line_styles

REPORT_KIND = "training report"
REPORT_VERSION = 1
PAGE_NAME = "report.html"
MARKDOWN_NAME = "rows.md"
JSON_NAME = "runs.json"


def report_runs(folders: Sequence[Path], out: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Runs side by side, as JSON and as lines of Markdown; with `out` also as a folder with a page.

    Args:
        folders: Of runs, finished or not; a folder that is given twice counts once.
        out: Takes the place of an older report there.

    Raises:
        ValueError: there are no folders.
        ArtifactError: a folder holds no run, or something that is no report lies at `out`.
    """
    if out is not None and out.exists():
        read_manifest(out, kind=REPORT_KIND, newest_version=REPORT_VERSION)
    comparison = compare_runs(folders)
    tree, lines = comparison.as_json(), comparison_lines(comparison)
    if out is not None:
        identities = {row.name: row.history.record.get("identity") for row in comparison.rows}
        manifest = Manifest(
            REPORT_KIND,
            REPORT_VERSION,
            parents={name: identity for name, identity in identities.items() if isinstance(identity, str)},
            details={"num_runs": len(comparison.rows), "num_recipes": len(comparison.recipes)},
            locations={row.name: str(row.history.folder) for row in comparison.rows},
        )
        page = render_page(comparison)
        with publishing(out, replace=True) as temporary:
            (temporary / PAGE_NAME).write_text(page, encoding="utf-8", errors="replace")
            (temporary / MARKDOWN_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
            (temporary / JSON_NAME).write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            write_manifest(temporary, manifest)
    return tree, lines


def render_page(comparison: RunComparison) -> str:
    """The same runs give the same text."""
    styles = line_styles([len(recipe.rows) for recipe in comparison.recipes])
    of_rows = [style for own in styles for style in own]
    curves = curves_svg([row.history for row in comparison.rows], of_rows)
    environment = Environment(
        loader=PackageLoader("training"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("run_report.html").render(
        headings=HEADINGS,
        recipes=[list(table_lines(recipe)) for recipe in comparison.recipes],
        has_intervals=any(recipe.num_seeds > 1 for recipe in comparison.recipes),
        names=[row.name for row in comparison.rows],
        settings=list(settings_lines(comparison)),
        remarks=comparison.remarks,
        curves=None if curves is None else Markup(curves),
        legend=[(row.name, style) for row, style in zip(comparison.rows, of_rows, strict=True)],
        origins=[origin(row) for row in comparison.rows],
    )


def origin(row: RunRow) -> dict[str, str]:
    """What made a run, as far as its record tells."""
    starts = row.history.record.get("starts") or [{}]
    last = starts[-1]
    versions = last.get("versions", {})
    return {
        "run": row.name,
        "folder": str(row.history.folder),
        "command": str(last.get("command", "")),
        "processes": f"{last.get('world_size', '?')} on {last.get('device', '?')}" if last else "",
        "commit": str(versions.get("commit", "")),
        "starts": str(len(starts)) if last else "",
    }
