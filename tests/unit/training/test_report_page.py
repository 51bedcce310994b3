"""The page, the table and the curves of runs."""

import json
import logging
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.artifacts import read_manifest, verify_files
from lookalike.errors import ArtifactError
from lookalike.events import EventLog
from tests.unit.training.written_runs import make_run, write_steps
from training.reporting.comparison import write_table
from training.reporting.curves import binned, draw_curves, write_curves
from training.reporting.page import REPORT_KIND, REPORT_VERSION, report_runs
from training.reporting.run_history import read_run


class _Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = ("<img src=x onerror=alert(1)>", "a|b`c\n$x$", "_\\|\x1b[2J", "\udcff")


def hostile_runs(folder: Path) -> list[Path]:
    return [
        make_run(folder / name, recipe=name, loss={"<b>name": f"</td><script>{name}</script>"}, validations=[0.1])
        for name in HOSTILE
    ]


def test_hostile_names_are_text_and_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    runs = hostile_runs(tmp_path)
    report_runs(runs, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = _Page(text)
    assert not {"img", "script", "b", "link", "iframe", "object", "image"} & set(page.tags)
    assert "svg" in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "data", "action")
        assert name not in ("href", "xlink:href") or value.startswith("#")
        assert "http" not in value or name.startswith("xmlns")
    assert not re.search(r"@import|url\((?!['\"]?#)", text)
    assert not re.findall(r"[:=]\s*['\"]?#[0-9a-f]{3,6}\b", text[text.index('<figure class="drawing"') :]), (
        "the page's colours, or it could not be read in the dark"
    )
    assert HOSTILE[0] in page.text
    assert f"</td><script>{HOSTILE[0]}</script>" in page.text


def test_hostile_names_break_neither_table_nor_terminal(tmp_path: Path) -> None:
    _, lines = report_runs(hostile_runs(tmp_path))
    assert all(line.isprintable() for line in lines)
    tables: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    results, settings = tables[:2]
    for table in (results, settings):
        assert len({line.count("|") for line in table}) == 1
        assert len({len(line) for line in table}) == 1, "columns are aligned"
    assert len(results) == 2 + len(HOSTILE)


def test_a_report_is_an_artifact_and_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", seed=seed, validations=[0.5 + seed / 10]) for seed in (0, 1)]
    out = tmp_path / "report"
    report_runs(runs[:1], out)
    tree, lines = report_runs(runs, out)
    manifest = read_manifest(out, kind=REPORT_KIND, newest_version=REPORT_VERSION)
    verify_files(out, manifest)
    assert set(manifest.files) == {"report.html", "rows.md", "runs.json"}
    assert manifest.parents == {"a0": "r 0", "a1": "r 1"}
    assert json.loads((out / "runs.json").read_text()) == tree
    assert (out / "rows.md").read_text().splitlines() == lines
    text = (out / "report.html").read_text()
    assert tree["recipes"][0]["means"]["best_validation"]["num_seeds"] == 2
    assert "2 seeds" in _Page(text).text
    report_runs(runs, out)
    assert (out / "report.html").read_text() == text, "the same runs give the same page"


def test_a_report_takes_the_place_of_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ArtifactError, match="not a finished training report"):
        report_runs([run], run)
    assert (run / "settings.yaml").exists()


def test_a_folder_without_a_run_is_named_and_no_report_is_written(tmp_path: Path) -> None:
    run, empty = make_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match=re.escape(str(empty))):
        report_runs([run, empty], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="no runs"):
        report_runs([])


def test_a_run_without_events_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=0, is_finished=False)
    tree, lines = report_runs([run], tmp_path / "report")
    assert tree["remarks"] == ["run has no events: nothing was trained yet, or its event files are gone"]
    assert tree["remarks"][0] in lines[-1]
    assert tree["runs"][0]["best_validation"] is tree["runs"][0]["seconds"] is None
    page = _Page((tmp_path / "report" / "report.html").read_text())
    assert "No run has events yet" in page.text
    assert "svg" not in page.tags


def test_what_json_does_not_know_is_told_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", loss={"margin": math.inf})
    with EventLog(run / "events-rank0.jsonl") as events:
        events.write("validation", step=40, value=math.nan)
    other = make_run(tmp_path / "b", recipe="s", loss={"margin": 1.0})
    tree, _ = report_runs([run, other], tmp_path / "report")
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert tree["runs"][0]["settings"]["loss.margin"] == "inf"
    assert tree["runs"][0]["final_validation"] is None


def test_curves_show_a_resumed_run_as_it_went(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=30, validations=[0.1, 0.3, 0.2])
    write_steps(run, range(25, 40), loss=2.0)
    history = read_run(run)
    panels = {axes.get_title(): axes for axes in draw_curves([history]).axes}
    assert list(panels) == [
        "loss above floor",
        "hit rate in the batch",
        "recall in the batch",
        "validation",
        "learning rate",
        "images/s",
    ]
    steps, values = panels["images/s"].lines[0].get_data()
    assert list(steps) == list(range(1, 41)), "in steps done, as validations count"
    assert list(values) == [10.0] * 40
    steps, values = panels["loss above floor"].lines[0].get_data()
    assert (list(steps), list(values)) == (list(range(1, 26)), [0.5] * 25)
    steps, values = panels["validation"].lines[0].get_data()
    assert (list(steps), list(values)) == ([10, 20], [0.1, 0.3])
    path = write_curves(run)
    assert path == run / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_is_one_line_of_a_table_in_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=25, validations=[0.1, 0.3])
    path = write_table(run)
    assert path == run / "table.md"
    heading, _, row, *_ = path.read_text().splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (heading, row)), strict=True))
    assert (cells["run"], cells["seed"], cells["best validation"]) == ("`run`", "0", "0.3000")


def test_curves_that_cannot_be_drawn_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = make_run(tmp_path / "empty", num_steps=0)
    for run, reason in ((empty, "no events"), (tmp_path / "nowhere", "no training run")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert write_curves(run) == run / "curves.png"
        assert "curves.png was not written" in caplog.text
        assert reason in caplog.text
        assert not (run / "curves.png").exists()


@given(st.dictionaries(st.integers(0, 1000), st.floats(-10, 10) | st.just(math.nan), max_size=60), st.integers(1, 20))
def test_a_long_course_is_drawn_by_means_of_neighbours(values: dict[int, float], num_bins: int) -> None:
    values = dict(sorted(values.items()))
    kept = [(step, value) for step, value in values.items() if not math.isnan(value)]
    steps, means = binned(values, num_bins=num_bins)
    assert len(steps) == len(means) == min(num_bins, len(kept))
    assert list(steps) == sorted(steps)
    if len(kept) <= num_bins:
        assert list(zip(steps, means, strict=True)) == kept
        return
    # Each point takes the next few pairs; sizes differ by one at most, the larger ones first.
    start = 0
    for place, (step, mean) in enumerate(zip(steps, means, strict=True)):
        size = len(kept) // num_bins + (place < len(kept) % num_bins)
        part = kept[start : start + size]
        assert step == pytest.approx(statistics.fmean(own for own, _ in part))
        assert mean == pytest.approx(statistics.fmean(own for _, own in part), abs=1e-12)
        start += size
    assert start == len(kept)
