import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from evaluation.benchmarks import BENCHMARKS, ClassBenchmark
from evaluation.bootstrap import bootstrap_mean
from evaluation.compare import compare_results, open_result
from evaluation.reporting.folder import read_baselines, read_report, write_report
from evaluation.reporting.headlines import Column, Row, Value
from evaluation.reporting.published import published_benchmark, published_benchmarks, published_rows
from evaluation.reporting.rows import escape_latex, escape_markdown, latex_rows, markdown_rows
from evaluation.reporting.values import ConfusingPicture, Contender, Gallery, PrecisionRecall, ShownPicture
from evaluation.result import CurvePoint, Result, Section
from lookalike.artifacts import Manifest, publishing, read_manifest, verify_files, write_manifest
from lookalike.errors import ArtifactError, ManifestMismatch
from lookalike.ranking_metrics import class_metrics, landmark_metrics

HOSTILE = '<script>alert("1")</script> & $x_1$ | \\ % {~^} \' onerror="x" https://example.org/x.png'


def jpeg(colour: str = "teal") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, "JPEG")
    return stream.getvalue()


def landmarks(seed: int = 0, *, num_distractors: int = 0, names: Sequence[str] | None = None, **other: Any) -> Result:
    generator = np.random.default_rng(seed)
    queries = tuple(names or (f"query {number}" for number in range(20)))
    clusters = np.arange(len(queries)) // 2
    sections = {
        name: Section(
            queries, clusters, {metric: generator.random(len(queries)) for metric in ("map", "mp@1", "mp@10")}
        )
        for name in ("easy", "medium", "hard")
    }
    sections["easy"].per_query["map"][3] = np.nan
    record = {
        "protocol": "Queries are cropped.",
        "num_distractors": num_distractors,
        "counts": {"gallery": {"found": 4_993}},
        "scales": [1, 2],
        "files": [{"path": "a.npy"}, {"path": "b.npy"}],
    }
    return Result("roxford5k", sections, record, **other)


def classes(num_queries: int, seed: int = 0, *, num_clusters: int | None = None) -> Result:
    generator = np.random.default_rng(seed)
    hits = {f"hit_rate@{k}": generator.integers(0, 2, num_queries).astype(np.float64) for k in (1, 10)}
    bounds = {"map@r": np.sort(generator.random((num_queries, 2)), axis=1)}
    clusters = np.arange(num_queries) % (num_clusters or num_queries)
    names = tuple(f"query {number}" for number in range(num_queries))
    return Result("sop", {"leave_one_out": Section(names, clusters, hits, bounds)}, {"num_gallery": num_queries})


def with_map(result: Result, seed: int) -> Result:
    section = result.sections["leave_one_out"]
    values = np.random.default_rng(seed).random(len(section.query_names))
    return replace(result, sections={"leave_one_out": replace(section, per_query={**section.per_query, "map": values})})


def write_whole_report(folder: Path, name: str = "ours", **other: Any) -> str:
    """A page with all its parts."""
    kinds: tuple[Literal["relevant", "junk", "unrelated"], ...] = ("relevant", "junk", "unrelated")
    shown = [ShownPicture(f"{name} {kind}", kind, jpeg() if kind == "junk" else None, 0.5) for kind in kinds]
    queries = [f"{name} {number}" for number in range(20)]
    curve = [CurvePoint(count, {"medium": 0.5 - count / 10**7, "hard": 0.2}) for count in (0, 1_000, 1_001_001)]
    result = landmarks(names=queries, num_distractors=1_001_001, curve=curve, warnings=[f"{name} is doubtful"])
    before = landmarks(1, names=queries)
    arguments: dict[str, Any] = {
        "name": name,
        "title": name,
        "command": f"lookalike evaluate {name}",
        "baselines": [Contender(f"{name} before", before)],
        "galleries": [Gallery("hard", ShownPicture(f"{name} 0", "query", jpeg("navy")), shown, shown[:1])],
        "confusing": [ConfusingPicture(shown[2], num_queries=1_234, best_position=4)],
        "precision_recall": [
            PrecisionRecall(section, [0.0, 0.5, 1.0], [1.0, 0.7, 0.1]) for section in ("medium", "hard")
        ],
    }
    write_report(folder, result, **{**arguments, **other})
    return (folder / "report.html").read_text()


class PageReader(HTMLParser):
    """Tags with attributes, the texts of elements, and tables as rows of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._is_style = self._is_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._is_style = tag == "style"
        self._is_cell = self._is_cell or tag in ("th", "td")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_style = False
        self._is_cell = self._is_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._is_style:
            return
        self.text += data
        if self._is_cell:
            self.tables[-1][-1][-1] += data

    def headings(self) -> list[int]:
        return [int(tag[1]) for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]

    def table(self, first_heading: str) -> list[list[str]]:
        (found,) = (table for table in self.tables if table[0][0] == first_heading)
        return [[" ".join(cell.split()) for cell in row] for row in found]


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_whole_report(tmp_path_factory.mktemp("whole") / "report")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_whole_report(tmp_path_factory.mktemp("hostile") / "report", name=HOSTILE)


def test_every_number_of_the_table_is_that_of_the_result(whole_page: str) -> None:
    table = PageReader(whole_page).table("in percent")
    columns = [(section, metric) for section in ("easy", "medium", "hard") for metric in ("map", "mp@10")]
    assert table[0] == ["in percent", "easy 19 queries", "medium 20 queries", "hard 20 queries"]
    assert table[1] == ["mAP", "mP@10"] * 3
    names = [f"ours {number}" for number in range(20)]
    for cells, result in zip(table[2:4], (landmarks(names=names), landmarks(1, names=names)), strict=True):
        for text, (section, metric) in zip(cells[1:], columns, strict=True):
            values = result.sections[section].per_query[metric]
            estimate = bootstrap_mean(values, result.sections[section].clusters)
            assert estimate.mean == pytest.approx(np.nanmean(values))
            assert text == f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    assert [row[0] for row in table[2:4]] == ["ours", "ours before"]


def test_published_rows_stand_apart_and_name_their_source(whole_page: str) -> None:
    table = PageReader(whole_page).table("in percent")[4:]
    sources = [cells[0] for cells in table if len(cells) == 1]
    assert sources
    assert all(re.fullmatch(r"Published, not measured here: .*arXiv:2108\.11179", source) for source in sources)
    rows = [cells for cells in table if len(cells) > 1]
    assert ["RS@k, R101, GLDv1 published", "-", "-", "50.1", "-", "25.8", "-"] in [
        [cell.replace("\N{EN DASH}", "-") for cell in cells] for cells in rows
    ]
    assert all(cells[0].endswith(" published") for cells in rows)


def test_paired_differences_are_those_of_a_comparison(whole_page: str) -> None:
    names = [f"ours {number}" for number in range(20)]
    found = compare_results(landmarks(1, names=names), landmarks(names=names))
    rows = PageReader(whole_page).table("section")[1:]
    assert len(rows) == 6
    for section, label, before, after, difference, won, lost, verdict in rows:
        own = found[section][{"mAP": "map", "mP@10": "mp@10"}[label]]
        assert (before, after, won, lost) == (f"{own.before:.1f}", f"{own.after:.1f}", str(own.wins), str(own.losses))
        assert difference == f"{own.difference:+.1f} [{own.low:+.1f}, {own.high:+.1f}]"
        assert (verdict == "within noise") == own.is_within_noise


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    for number in (1, 2):
        write_whole_report(tmp_path / str(number))
    files = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"report.html", "result.json", "rows.md", "rows.tex", "manifest.json"}
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def test_hostile_names_stay_text(hostile_page: str) -> None:
    reader = PageReader(hostile_page)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert reader.text.count(HOSTILE) > 20
    alternatives = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    assert f"place 2, junk, {HOSTILE} junk, score 0.500" in alternatives
    in_figures = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", hostile_page))
    assert html.escape('<script>alert("1")</script>', quote=False) in in_figures


def test_nothing_is_asked_of_anybody(whole_page: str, hostile_page: str) -> None:
    for page in (whole_page, hostile_page):
        for tag, attributes in PageReader(page).tags:
            assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
            for name in ("src", "srcset", "href", "data", "action", "poster", "background"):
                assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
            assert not re.search(r"url\((?!#)", " ".join(attributes.values()))
        (styles,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
        assert "url(" not in styles
        assert "@import" not in styles
        assert (
            "Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
        )


def test_what_makes_the_numbers_doubtful_is_said_first(whole_page: str) -> None:
    text = PageReader(whole_page).text
    assert "Benchmark roxford5k: 19 to 20 queries, 4,993 gallery pictures, 1,001,001 distractors\nQueries are" in text
    assert text.index("1,001,001 distractors") < text.index("ours is doubtful") < text.index("Results")


def test_a_page_can_be_read_without_seeing_it(whole_page: str) -> None:
    reader = PageReader(whole_page)
    assert whole_page.startswith('<!doctype html>\n<html lang="en">')
    assert whole_page.endswith("</html>\n")
    headings = reader.headings()
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip([0, *headings], headings, strict=False))
    for tag, attributes in reader.tags:
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "colgroup", "rowgroup")
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") in ("img", "region"):
            assert attributes["aria-label"]
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    pointed_at = set(re.findall(r'(?:url\(|href=")#([^")]+)', whole_page))
    assert pointed_at <= set(ids)


def test_the_record_is_shown_leaf_by_leaf(whole_page: str) -> None:
    assert PageReader(whole_page).table("protocol") == [
        ["protocol", "Queries are cropped."],
        ["num_distractors", "1001001"],
        ["counts / gallery / found", "4993"],
        ["scales", "[1, 2]"],
        ["files / 1 / path", "a.npy"],
        ["files / 2 / path", "b.npy"],
    ]


def test_what_a_picture_is_is_not_told_by_colour_alone(whole_page: str) -> None:
    gallery = whole_page[whole_page.index('<section class="gallery"') :]
    captions = [re.sub("<[^>]*>", "", text) for text in re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", gallery)]
    assert captions == ["?", "✓ 1 0.50", "~ 2 0.50", "✗ 3 0.50", "✓ 0.50", "✗ 0.50"]
    assert "in the way of 1,234 queries, at best at place 5" in whole_page
    for kind in ("relevant", "unrelated"):  # these have no bytes
        assert re.search(
            rf'role="img" aria-label="place \d, {kind}, ours {kind}, score 0.500">ours {kind}</span>', gallery
        )


def test_figures_take_the_pages_colours(whole_page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", whole_page, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        assert not re.search(r"#0[1-4][0-9a-f]{4}\b", drawing), "a stand-in for a colour is left"
        assert "var(--ink)" in drawing
        assert "var(--series-1)" in drawing
        assert "metadata" not in drawing


def test_parts_without_content_are_left_out(tmp_path: Path) -> None:
    write_report(tmp_path / "report", classes(5), name="ours", title="Small", command="")
    page = (tmp_path / "report" / "report.html").read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == ["Results", "Intervals", "Queries", "How it was measured", "How to quote it"]
    assert "Made by" not in page
    assert list((tmp_path / "report" / "baselines").iterdir()) == []


def test_a_metric_that_is_only_bounded_is_shown_as_a_range(tmp_path: Path) -> None:
    result = classes(30)
    write_report(
        tmp_path / "report",
        result,
        name="server",
        title="Bounds",
        command="",
        baselines=[Contender("brute force", classes(30, seed=1))],
    )
    page = (tmp_path / "report" / "report.html").read_text()
    low, high = 100 * result.sections["leave_one_out"].bounds["map@r"].mean(axis=0)
    cells = PageReader(page).table("in percent")[2]
    assert cells[-1] == f"{low:.1f} to {high:.1f}"
    assert "only known to lie between" in page
    for file in ("rows.md", "rows.tex"):
        assert f" {low:.1f} to {high:.1f} " in (tmp_path / "report" / file).read_text()


def test_queries_without_a_value_and_metrics_without_one_are_said_to_have_none(tmp_path: Path) -> None:
    result = landmarks()
    result.sections["hard"].per_query["map"][:] = np.nan
    write_report(tmp_path / "report", result, name="ours", title="NaN", command="")
    page = (tmp_path / "report" / "report.html").read_text()
    table = PageReader(page).table("in percent")
    assert table[0][3] == "hard 0 queries"
    assert table[2][5] == "\N{EN DASH}"
    queries = PageReader(page).table("query")[1:]
    assert [row[3] for row in queries[-21:]] == ["no value"] * 21
    assert not re.search(r">\s*[+-]?nan\b", page)
    assert "NaN" not in (tmp_path / "report" / "result.json").read_text()


def test_one_query_has_no_interval(tmp_path: Path) -> None:
    write_report(tmp_path / "report", classes(1), name="ours", title="One", command="")
    page = (tmp_path / "report" / "report.html").read_text()
    table = PageReader(page).table("in percent")
    assert table[0][1] == "leave_one_out 1 query"
    assert all(re.fullmatch(r"\d+\.\d( to \d+\.\d)?", cell) for cell in table[2][1:])


def test_the_queries_that_lost_most_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    result, before = (with_map(classes(600), seed) for seed in (2, 3))
    write_report(
        tmp_path / "report", result, name="ours", title="Many", command="", baselines=[Contender("old", before)]
    )
    page = (tmp_path / "report" / "report.html").read_text()
    rows = PageReader(page).table("query")[1:]
    old, new = (100 * own.sections["leave_one_out"].per_query["map"] for own in (before, result))
    worst_first = sorted(range(600), key=lambda query: new[query] - old[query])
    assert [row[0] for row in rows] == [f"query {query}" for query in worst_first[:500]]
    assert rows[0][3:] == [
        f"{value[worst_first[0]]:+.1f}".lstrip("+" * (place < 2)) for place, value in enumerate((new, old, new - old))
    ]
    assert "100 more are not shown." in page
    assert len(json.loads((tmp_path / "report" / "result.json").read_text())["leave_one_out"]["queries"]) == 600


def test_without_a_baseline_the_lowest_values_come_first(tmp_path: Path) -> None:
    write_report(tmp_path / "report", landmarks(), name="ours", title="Alone", command="")
    rows = PageReader((tmp_path / "report" / "report.html").read_text()).table("query")[1:]
    values = [float(row[3]) for row in rows if row[3] != "no value"]
    assert values == sorted(values)
    assert len(values) == 59
    assert rows[-1][3] == "no value"


def test_the_folder_holds_what_its_manifest_says(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_whole_report(folder, baselines=[Contender("../../a b", landmarks(1, names=[f"ours {n}" for n in range(20)]))])
    manifest = read_manifest(folder, kind="evaluation", newest_version=2)
    verify_files(folder, manifest)
    assert manifest.format_version == 2
    assert manifest.details == {
        "benchmark": "roxford5k",
        "sections": ["easy", "medium", "hard"],
        "num_queries": {"easy": 19, "medium": 20, "hard": 20},
        "baselines": [{"name": "../../a b", "file": "baselines/1-.._.._a_b.json"}],
    }
    expected = ["baselines/1-.._.._a_b.json", "report.html", "result.json", "rows.md", "rows.tex"]
    assert sorted(manifest.files) == expected
    assert open_result(folder).benchmark == "roxford5k"
    (baseline,) = read_baselines(folder)
    assert baseline.name == "../../a b"
    assert baseline.result.sections["hard"].query_names == tuple(f"ours {number}" for number in range(20))


def test_a_finished_evaluation_is_read_for_the_same_parents_and_settings_only(tmp_path: Path) -> None:
    folder, result = tmp_path / "report", classes(20)
    made_from: dict[str, Any] = {"parents": {"index": "ab"}, "settings": {"ks": (1, 5)}}
    assert read_report(folder, **made_from) is None
    write_report(folder, result, name="ours", title="Once", command="", **made_from)
    found = read_report(folder, **made_from)
    assert found is not None
    own, read = (each.sections["leave_one_out"] for each in (result, found))
    assert read.query_names == own.query_names
    np.testing.assert_allclose(read.bounds["map@r"], own.bounds["map@r"], rtol=1e-15)  # times 100, divided by 100
    assert read_report(folder, parents={"index": "cd"}, settings=made_from["settings"]) is None
    assert read_report(folder, parents=made_from["parents"], settings={"ks": (1,)}) is None
    (folder / "rows.md").write_text("better numbers")
    assert read_report(folder, **made_from) is None
    write_report(folder, result, name="ours", title="Twice", command="", **made_from)
    assert read_report(folder, **made_from) is not None


def test_an_evaluation_of_the_former_format_is_not_read_but_replaced(tmp_path: Path) -> None:
    with publishing(tmp_path / "report") as temporary:
        (temporary / "result.json").write_text("{}")
        write_manifest(temporary, Manifest("evaluation", 1))
    assert read_report(tmp_path / "report", parents={}, settings={}) is None
    write_report(tmp_path / "report", classes(3), name="ours", title="New", command="")
    assert read_report(tmp_path / "report", parents={}, settings={}) is not None


def test_nothing_but_an_evaluation_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    with pytest.raises(ArtifactError, match="thesis is not a finished evaluation"):
        write_report(tmp_path / "thesis", classes(3), name="ours", title="New", command="")
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "text"]


def test_a_baseline_of_other_queries_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestMismatch, match="only values of the same queries can be paired"):
        write_report(
            tmp_path / "report",
            classes(3),
            name="ours",
            title="New",
            command="",
            baselines=[Contender("old", classes(4))],
        )
    assert list(tmp_path.iterdir()) == []


def test_published_numbers_are_percentages_of_metrics_and_benchmarks_that_exist() -> None:
    for benchmark in published_benchmarks():
        own = BENCHMARKS[benchmark.removesuffix("+r1m")]
        if isinstance(own, ClassBenchmark):
            sections, metrics = set(map(str, own.protocols)), set(class_metrics(own.ks))
        else:
            sections, metrics = {"easy", "medium", "hard"}, set(landmark_metrics((1, 5, 10)))
        rows = published_rows(benchmark)
        assert len({row.name for row in rows}) == len(rows) > 3
        for row in rows:
            assert row.source
            assert row.values
            for column, value in row.values.items():
                assert column.section in sections
                assert column.metric in metrics
                assert 0 <= value.mean <= 100
                assert not value.interval
            by_k = [value.mean for column, value in row.values.items() if column.metric.startswith("hit_rate@")]
            assert by_k == sorted(by_k), "more answers cannot find less"


def test_a_million_distractors_lower_every_published_number() -> None:
    for benchmark in ("roxford5k", "rparis6k"):
        alone = {row.name: row for row in published_rows(benchmark)}
        for row in published_rows(f"{benchmark}+r1m"):
            assert all(value.mean < alone[row.name].values[column].mean for column, value in row.values.items())


@pytest.mark.parametrize(
    ("num_distractors", "expected"),
    [(0, "roxford5k"), (10_000, None), (1_000_877, "roxford5k+r1m"), (1_001_001, "roxford5k+r1m"), (2_000_000, None)],
)
def test_only_rows_of_as_many_distractors_are_comparable(num_distractors: int, expected: str | None) -> None:
    assert published_benchmark(landmarks(num_distractors=num_distractors)) == expected
    assert bool(published_rows(expected)) == (expected is not None)


def test_rows_to_quote_hold_the_numbers_with_and_without_intervals() -> None:
    columns = [Column("medium", "map"), Column("medium", "hit_rate@1"), Column("medium", "map@r")]
    values = {columns[0]: Value(68.349, 60.1, 76.04), columns[2]: Value(math.nan, 41.2, 43.9)}
    rows = [Row("ours", values), Row("theirs", {columns[0]: Value(67.0, math.nan, math.nan)}, source="paper")]
    assert markdown_rows(columns, rows, with_intervals=True) == [
        r"|  | medium mAP | medium R@1 (hit rate) | medium MAP@R |",
        "|---|---:|---:|---:|",
        r"| ours | 68.3 \[60.1, 76.0\] | - | 41.2 to 43.9 |",
        "| theirs (published, not measured here) | 67.0 | - | - |",
    ]
    assert latex_rows(columns, rows) == [
        "% method & medium mAP & medium R@1 (hit rate) & medium MAP@R",
        r"ours & 68.3 & - & 41.2 to 43.9 \\",
        r"theirs (published, not measured here) & 67.0 & - & - \\",
    ]
    assert latex_rows(columns, rows, with_intervals=True)[1] == r"ours & 68.3 {[}60.1, 76.0] & - & 41.2 to 43.9 \\"


def test_hostile_names_do_not_break_rows() -> None:
    name = f"{HOSTILE}\nsecond line\\"
    columns = [Column(name, "map")]
    rows = [Row(name, {columns[0]: Value(1.0, 0.5, 1.5)})]
    for line in markdown_rows(columns, rows, with_intervals=True):
        assert "\n" not in line
        unescaped = re.sub(r"\\.", "", line)
        assert unescaped.count("|") == 3
        assert "<" not in unescaped
    for line in latex_rows(columns, rows, with_intervals=True):
        assert "\n" not in line
        assert len(re.findall(r"(?<!\\)&", line)) == 1
    body = latex_rows(columns, rows)[1]
    assert not re.search(r"(?<!\\)[%$#_~^]", body)
    assert body.endswith(r" & 1.0 \\")
    assert re.sub(r"\\(.)", r"\1", escape_markdown(name)) == " ".join(name.split())
    assert escape_latex("a_b\\c") == r"a\_b\textbackslash{}c"
