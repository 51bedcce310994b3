import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.__main__ import app
from evaluation.compare import compare
from lookalike.errors import DataError, SettingsError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "revisited"
OXFORD = ("--benchmark", "roxford5k", "--ground-truth", str(GOLDEN / "gnd_roxford5k.pkl"))


def in_process(*arguments: str) -> None:
    app(["descriptors", *arguments], standalone_mode=False)


def in_own_process(*arguments: str, launcher: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "descriptors", *arguments], capture_output=True, text=True, timeout=200
    )


@pytest.fixture
def golden_descriptors(tmp_path: Path) -> dict[str, Path]:
    """Identity queries: the database's descriptors are then the columns of the golden scores, and products exact."""
    with np.load(GOLDEN / "roxford5k_scores_f32.npz") as stored:
        scores = stored["scores"]
    np.save(tmp_path / "q.npy", np.eye(70, dtype=np.float32))
    np.save(tmp_path / "x.npy", np.ascontiguousarray(scores.T))
    np.save(tmp_path / "d.npy", np.full((50, 70), scores.min() - 1, np.float32))
    return {name: tmp_path / f"{name}.npy" for name in "qxd"}


def test_the_command_prints_the_official_numbers_for_anybodys_files(
    golden_descriptors: dict[str, Path], tmp_path: Path
) -> None:
    official = json.loads((GOLDEN / "golden_revisitop.json").read_text())["roxford5k"]
    files = {name: str(path) for name, path in golden_descriptors.items()}
    result = in_own_process(
        *(*OXFORD, "--queries", files["q"], "--database", files["x"], "--distractors", files["d"]),
        *("--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "report")),
        launcher=("-m", "lookalike", "evaluate"),
    )
    assert result.returncode == 0, result.stderr
    assert "not of unit length" in result.stdout
    tree = json.loads((tmp_path / "out.json").read_text())
    for setup, letter in (("easy", "E"), ("medium", "M"), ("hard", "H")):
        assert tree[setup]["map"] == pytest.approx(100 * official[letter]["map"], abs=1e-7)
        for k, expected in zip((1, 5, 10), official[letter]["mpr"], strict=True):
            assert tree[setup][f"mp@{k}"] == pytest.approx(100 * expected, abs=1e-7)
        for kind in ("by_query", "by_cluster"):
            low, high = tree[setup]["intervals"]["map"][kind]
            assert low < tree[setup]["map"] < high
        assert list(tree[setup]["aps"].values()) == tree[setup]["per_query"]["map"]
        assert f"{100 * official[letter]['map']:.2f}" in result.stdout
    assert "tie gap" in result.stdout
    record = tree["record"]
    assert record["num_distractors"] == 50
    assert record["counts"]["gallery"] == {"expected": 4993, "found": 4993, "failed": "unknown"}
    assert (record["crop"], record["ties"], record["similarity"]) == ("unknown", "index", "inner product in float32")
    assert [point["num_distractors"] for point in tree["curve"]] == [0, 50]
    assert not list(tmp_path.glob("*.progress.npz"))
    assert (tmp_path / "report" / "report.html").exists()
    assert r"\&" not in (tmp_path / "report" / "rows.md").read_text()
    tree["hard"]["per_query"]["map"] = [ap + 1 for ap in tree["hard"]["per_query"]["map"]]
    (tmp_path / "better.json").write_text(json.dumps(tree))
    comparison, _ = compare(tmp_path / "report", tmp_path / "better.json")
    assert comparison["sections"]["hard"]["map"]["difference"] == pytest.approx(1)
    assert (comparison["sections"]["hard"]["map"]["wins"], comparison["sections"]["easy"]["map"]["wins"]) == (70, 0)


def test_a_short_ranking_gives_bounds_that_hold_the_truth(
    golden_descriptors: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = json.loads((GOLDEN / "golden_revisitop.json").read_text())["roxford5k"]
    scores = np.load(golden_descriptors["x"]).T
    np.save(tmp_path / "r.npy", np.argsort(-scores, axis=1, kind="stable")[:, :100])
    in_process(*OXFORD, "--rankings", str(tmp_path / "r.npy"), "--json", "-")
    tree = json.loads(capsys.readouterr().out)
    for setup, letter in (("easy", "E"), ("medium", "M"), ("hard", "H")):
        assert tree[setup]["map"] is None
        low, high = tree[setup]["bounds"]["map"]
        assert low < 100 * official[letter]["map"] < high
    assert tree["easy"]["mp@10"] == pytest.approx(100 * official["E"]["mpr"][2], abs=1e-7)
    # Some lists hold so much that is easy, and thus junk here, that fewer than ten places are left.
    assert tree["hard"]["mp@10"] is None


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[str, ...]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 4)
    vectors = generator.normal(size=(30, 8))[labels] + generator.normal(size=(120, 8))
    np.save(tmp_path / "q.npy", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
    np.save(tmp_path / "l.npy", labels)
    return ("--benchmark", "labels", "--queries", str(tmp_path / "q.npy"), "--query-labels", str(tmp_path / "l.npy"))


def test_labels_are_judged_by_each_protocol_under_its_own_name(
    labelled: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(*arguments: str) -> dict[str, Any]:
        in_process(*labelled, *arguments, "--json", "-")
        return json.loads(capsys.readouterr().out)

    alone = judged("--ks", "1,2", "--nmi")
    assert alone["sections"] == ["leave_one_out"]
    vectors, labels = np.load(tmp_path / "q.npy").astype(np.float64), np.load(tmp_path / "l.npy")
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -1)
    assert alone["leave_one_out"]["hit_rate@1"] == pytest.approx(100 * (labels[scores.argmax(1)] == labels).mean())
    assert 0 < alone["leave_one_out"]["nmi"] < 100
    random = judged("--protocol", "random-gallery", "--num-seeds", "3")
    assert random["sections"] == ["random_gallery"]
    assert len(random["random_gallery"]["per_seed"]["hit_rate@1"]) == 3
    gallery = ("--database", labelled[3], "--database-labels", labelled[5])
    # Without ids nothing tells that both files show the same pictures: each finds its copy.
    assert judged(*gallery)["query_gallery"]["hit_rate@1"] == 100
    np.save(tmp_path / "ids.npy", np.arange(120))
    same = judged(*gallery, "--query-ids", str(tmp_path / "ids.npy"), "--database-ids", str(tmp_path / "ids.npy"))
    assert same["query_gallery"]["hit_rate@1"] == alone["leave_one_out"]["hit_rate@1"]


def test_two_processes_print_the_numbers_of_one(
    labelled: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(*labelled, "--json", str(tmp_path / "1.json"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "evaluation")
    two = in_own_process(*labelled, "--json", str(tmp_path / "2.json"), launcher=torchrun)
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert capsys.readouterr().out.replace("1.json", "2.json") == two.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([*OXFORD[:2], "--queries", "{q}"], SettingsError, "needs --ground-truth"),
        (
            [*OXFORD, "--queries", "{q}", "--database", "{x}", "--query-labels", "{q}"],
            SettingsError,
            "--query-labels has no effect here",
        ),
        ([*OXFORD, "--queries", "{q}", "--database", "{q}"], DataError, "70 database descriptors"),
        (["--benchmark", "labels", "--queries", "{q}", "--query-labels", "{q}"], DataError, "whole number"),
        (["--benchmark", "labels", "--queries", "absent.npy", "--query-labels", "{q}"], DataError, "absent.npy"),
        (
            ["--benchmark", "labels", "--queries", "{q}", "--query-labels", "{q}", "--ks", "0"],
            SettingsError,
            "--ks '0'",
        ),
        (
            ["--benchmark", "rparis6k", *OXFORD[2:], "--queries", "{q}", "--database", "{x}"],
            DataError,
            "rparis6k has 6322",
        ),
        ([*OXFORD, "--rankings", "{q}"], DataError, "whole numbers"),
        ([*OXFORD, "--rankings", "{q}", "--ties", "pessimistic"], SettingsError, "--ties has no effect"),
        ([*OXFORD, "--queries", "{q}", "--database", "{x}", "--nmi"], SettingsError, "--nmi has no effect"),
        (
            ["--benchmark", "labels", "--queries", "{q}", "--query-labels", "{q}", "--num-seeds", "3"],
            SettingsError,
            "--num-seeds has no effect",
        ),
        ([*OXFORD, "--queries", "{nan}", "--database", "{x}"], DataError, "row 3 of the queries"),
        ([*OXFORD, "--queries", "{q}", "--database", "{x}", "--json", "/"], SettingsError, "is a folder"),
        ([*OXFORD[:3], "{q}", "--queries", "{q}", "--database", "{x}"], DataError, "cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_line(
    golden_descriptors: dict[str, Path], arguments: list[str], error: type[Exception], message: str
) -> None:
    vectors = np.eye(70, dtype=np.float32)
    vectors[3, 3] = np.nan
    np.save(golden_descriptors["q"].with_name("nan.npy"), vectors)
    places = {**golden_descriptors, "nan": golden_descriptors["q"].with_name("nan.npy")}
    with pytest.raises(error, match=message) as caught:
        in_process(*(argument.format(**places) for argument in arguments))
    assert len(str(caught.value)) < 600, "a message tells, and dumps nothing"


def test_a_comparison_says_what_it_left_out_and_what_was_measured_differently(
    golden_descriptors: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--queries", str(golden_descriptors["q"]), "--database", str(golden_descriptors["x"])]
    distractors = ["--distractors", str(golden_descriptors["d"])]
    in_process(*OXFORD, *files, "--json", str(tmp_path / "alone.json"))
    in_process(*OXFORD, *files, *distractors, "--ties", "pessimistic", "--json", str(tmp_path / "among.json"))
    scores = np.load(golden_descriptors["x"]).T
    np.save(tmp_path / "r.npy", np.argsort(-scores, axis=1, kind="stable")[:, :100])
    in_process(*OXFORD, "--rankings", str(tmp_path / "r.npy"), "--json", str(tmp_path / "short.json"))
    capsys.readouterr()
    _, lines = compare(tmp_path / "alone.json", tmp_path / "among.json")
    assert "measured differently: num distractors 0 before, 50 after" in lines
    assert "measured differently: ties index before, pessimistic after" in lines
    _, lines = compare(tmp_path / "alone.json", tmp_path / "short.json")
    assert "not compared: easy map is only bounded after" in lines


@pytest.mark.parametrize(
    ("task", "metric", "solution", "predictions"),
    [
        ("retrieval", "map@100", "id,images,Usage\n{a},{x} {y},Public\n", "id,images\n{a},{x}\n"),
        ("recognition", "gap", "id,landmarks,Usage\n{a},7,Public\n{b},8,Public\n", "id,landmarks\n{a},7 0.5\n{b},\n"),
    ],
)
def test_a_submission_is_scored(
    task: str, metric: str, solution: str, predictions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {name: name.encode().hex().zfill(16) for name in "abxy"}
    (tmp_path / "s.csv").write_text(solution.format(**ids))
    (tmp_path / "p.csv").write_text(predictions.format(**ids))
    files = ["--solution", str(tmp_path / "s.csv"), "--predictions", str(tmp_path / "p.csv")]
    app(["submission", task, *files, "--json", "-"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["public"][metric] == pytest.approx(50)
