"""The folder of an evaluation: numbers with the values of every query, baselines, rows to quote and the page."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.compare import RESULT_NAME
from evaluation.reporting.headlines import headline_columns, measured_row
from evaluation.reporting.page import Quotes, render_page
from evaluation.reporting.published import published_benchmark, published_rows
from evaluation.reporting.rows import latex_rows, markdown_rows
from evaluation.reporting.values import ConfusingPicture, Contender, Gallery, PrecisionRecall
from evaluation.result import Result, num_queries, read_result, write_result
from lookalike.artifacts import Manifest, fingerprint, publishing, read_manifest, verify_files, write_manifest
from lookalike.errors import ArtifactError

EVALUATION_KIND = "evaluation"
EVALUATION_VERSION = 2
REPORT_NAME = "report.html"
MARKDOWN_NAME = "rows.md"
LATEX_NAME = "rows.tex"
BASELINES_NAME = "baselines"


def write_report(
    folder: Path,
    result: Result,
    *,
    name: str,
    title: str,
    command: str,
    baselines: Sequence[Contender] = (),
    galleries: Sequence[Gallery] = (),
    confusing: Sequence[ConfusingPicture] = (),
    precision_recall: Sequence[PrecisionRecall] = (),
    parents: Mapping[str, str] = {},
    settings: Mapping[str, Any] = {},
) -> None:
    """Publishes a result at `folder`, in place of an older evaluation there.

    Args:
        name: Of the result, beside the names of the baselines.
        command: That made it; shown on the page.
        parents: Fingerprints of what was evaluated, by name.

    Raises:
        ArtifactError: something that is not an evaluation lies there.
        ManifestMismatch: a baseline was measured on other queries.
        DataError: a baseline has no section of the result.
    """
    require_replaceable(folder)
    own = Contender(name, result)
    columns = headline_columns(result)
    published = [row for row in published_rows(published_benchmark(result)) if row.values.keys() & set(columns)]
    rows = [*(measured_row(contender, columns) for contender in (own, *baselines)), *published]
    quotes = Quotes(
        *(
            "\n".join([*as_rows(columns, rows), "", *as_rows(columns, rows, with_intervals=True)]) + "\n"
            for as_rows in (markdown_rows, latex_rows)
        )
    )
    page = render_page(
        own,
        baselines,
        columns,
        rows,
        title=title,
        command=command,
        quotes=quotes,
        galleries=galleries,
        confusing=confusing,
        precision_recall=precision_recall,
    )
    with publishing(folder, replace=True) as temporary:
        write_result(temporary / RESULT_NAME, result)
        (temporary / BASELINES_NAME).mkdir()
        baseline_files = {
            f"{BASELINES_NAME}/{number}-{_file_name(baseline.name)}.json": baseline
            for number, baseline in enumerate(baselines, start=1)
        }
        for file_name, baseline in baseline_files.items():
            write_result(temporary / file_name, baseline.result)
        for file_name, text in ((REPORT_NAME, page), (MARKDOWN_NAME, quotes.markdown), (LATEX_NAME, quotes.latex)):
            (temporary / file_name).write_text(text, encoding="utf-8")
        details = {
            "benchmark": result.benchmark,
            "sections": list(result.sections),
            "num_queries": {section: num_queries(own) for section, own in result.sections.items()},
            "baselines": [{"name": baseline.name, "file": file} for file, baseline in baseline_files.items()],
        }
        write_manifest(temporary, Manifest(EVALUATION_KIND, EVALUATION_VERSION, parents, details, settings))


def read_report(folder: Path, *, parents: Mapping[str, str], settings: Mapping[str, Any]) -> Result | None:
    """The finished evaluation of the same parents and settings; None where there is none, or a file was edited."""
    try:
        manifest = read_manifest(folder, kind=EVALUATION_KIND, newest_version=EVALUATION_VERSION)
        if manifest.format_version != EVALUATION_VERSION:
            return None
        # By fingerprint: a tuple among the settings comes back from JSON as a list.
        if fingerprint([dict(manifest.parents), dict(manifest.settings)]) != fingerprint(
            [dict(parents), dict(settings)]
        ):
            return None
        verify_files(folder, manifest)
    except ArtifactError:
        return None
    return read_result(folder / RESULT_NAME)


def read_baselines(folder: Path) -> list[Contender]:
    """What the result of a finished evaluation was compared with.

    Raises:
        ArtifactError: no evaluation lies there.
        DataError: the file of a baseline cannot be read.
    """
    manifest = read_manifest(folder, kind=EVALUATION_KIND, newest_version=EVALUATION_VERSION)
    return [Contender(own["name"], read_result(folder / own["file"])) for own in manifest.details.get("baselines", [])]


def require_replaceable(folder: Path) -> None:
    """Raises ArtifactError if `folder` exists and is anything but an evaluation."""
    if folder.exists():
        read_manifest(folder, kind=EVALUATION_KIND, newest_version=EVALUATION_VERSION)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]
