import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation.compare import compare

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "revisited"


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lookalike", "evaluate", "descriptors", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
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
    result = evaluate(
        *("--benchmark", "roxford5k", "--ground-truth", str(GOLDEN / "gnd_roxford5k.pkl"), "--queries", files["q"]),
        *("--database", files["x"], "--distractors", files["d"], "--json", str(tmp_path / "out.json")),
    )
    assert result.returncode == 0, result.stderr
    assert "not of unit length" in result.stderr
    tree = json.loads((tmp_path / "out.json").read_text())
    for setup, letter in (("easy", "E"), ("medium", "M"), ("hard", "H")):
        assert tree[setup]["map"] == pytest.approx(100 * official[letter]["map"], abs=1e-7)
        assert tree[setup]["map_interval"][0] < tree[setup]["map"] < tree[setup]["map_interval"][1]
        assert f"{100 * official[letter]['map']:.2f}" in result.stdout
    assert tree["record"]["num_distractors"] == 50
    assert not list(tmp_path.glob("*.progress.npz"))
    tree["hard"]["aps"] = {query: ap + 1 for query, ap in tree["hard"]["aps"].items()}
    (tmp_path / "better.json").write_text(json.dumps(tree))
    comparison, _ = compare(tmp_path / "out.json", tmp_path / "better.json")
    assert comparison["metrics"]["mAP hard"]["difference"] == pytest.approx(0.01)
    assert (comparison["metrics"]["mAP hard"]["wins"], comparison["metrics"]["mAP easy"]["wins"]) == (70, 0)


def test_labels_are_judged_leave_one_out(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32))
    np.save(tmp_path / "l.npy", np.array([0, 0, 1, 1]))
    files = ("--queries", str(tmp_path / "q.npy"), "--query-labels", str(tmp_path / "l.npy"))
    result = evaluate("--benchmark", "labels", *files, "--ks", "1", "--json", "-")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["metrics"]["R@1"]["mean"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--benchmark", "roxford5k", "--queries", "{q}"], 2, "needs --ground-truth"),
        (["--benchmark", "labels", "--queries", "{q}", "--query-labels", "{q}"], 3, "whole numbers"),
        (["--benchmark", "labels", "--queries", "absent.npy", "--query-labels", "{q}"], 3, "absent.npy"),
        (
            ["--benchmark", "rparis6k", "--ground-truth", "{gnd}", "--queries", "{q}", "--database", "{x}"],
            3,
            "rparis6k has 6322",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    golden_descriptors: dict[str, Path], arguments: list[str], code: int, message: str
) -> None:
    places = {**golden_descriptors, "gnd": GOLDEN / "gnd_roxford5k.pkl"}
    result = evaluate(*(argument.format(**places) for argument in arguments))
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr
