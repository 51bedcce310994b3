"""`lookalike index build`, `check` and `describe` as a user calls them."""

import json
from pathlib import Path
from typing import Any

import pytest

from indexing.__main__ import main
from indexing.planning import calibration, planner
from indexing.versions import versions_of
from tests.unit.indexing.clustered_vectors import write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder, 1500)
    files = {"--vectors": "vectors.npy", "--ids": "ids.npy", "--metadata": "metadata.parquet"}
    return [part for option, name in files.items() for part in (option, str(folder / name))]


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "measure_rates", calibration.nominal_rates)


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_an_index_is_planned_built_checked_and_described(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    wishes = ["build", *source, "--out", index, "--type", "IVF8,SQ8", "--recall", 0.9, "--at", 5]
    assert run(*wishes, "--dry-run") == 0
    assert "IVF8,SQ8" in capsys.readouterr().out
    assert not versions_of(index)
    assert run(*wishes, "--json") == 0
    built = json.loads(capsys.readouterr().out)
    assert (built["version"], built["type"], built["num_vectors"], built["measured_depth"]) == (
        "v0001",
        "IVF8,SQ8",
        1500,
        5,
    )
    assert run("describe", index, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["columns"]["price"] == "double"
    assert described["recall_curve"] == built["recall_curve"] != []
    assert run("describe", index) == 0
    assert f"{built['recall_curve'][0]['recall']:.4f}  " in capsys.readouterr().out
    assert run("check", index) == 0
    assert "8 canaries are found" in capsys.readouterr().out
    metadata = index / "v0001" / "metadata.arrow"
    metadata.write_bytes(metadata.read_bytes().replace(b"picture", b"Picture", 1))
    assert run("check", index) == 5
    [line] = capsys.readouterr().err.strip().splitlines()
    assert str(metadata) in line


def test_wishes_that_cannot_be_kept_end_with_the_nearest_plan_and_code_4(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes = ["build", *source, "--out", tmp_path / "index", "--ram", "1KiB"]
    for dry_run in ([], ["--dry-run"]):
        assert run(*wishes, *dry_run) == 4
        printed = capsys.readouterr()
        assert "Nearest" in printed.out + printed.err
        assert not versions_of(tmp_path / "index")
    assert run(*wishes, "--accept-nearest") == 0
    assert versions_of(tmp_path / "index") == ["v0001"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --embeddings or --vectors"),
        (["--vectors", "a.npy", "--embeddings", "b"], "either --embeddings or --vectors"),
        (["--embeddings", "b", "--ids", "c.npy"], "belong to --vectors"),
        (["--embeddings", "b", "--recall", "1.5"], "recall"),
        (["--embeddings", "b", "--latency", "soon"], "latency"),
        (["--embeddings", "b", "--mode", "both"], "mode"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("build", "--out", tmp_path / "index", *options) == 2
    assert message in capsys.readouterr().err
