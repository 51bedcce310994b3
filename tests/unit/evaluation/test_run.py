import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from data_pipelines.shard_set import ShardSet
from evaluation.compare import compare
from evaluation.run import evaluate_embedding_sets
from indexing.build import build_index
from indexing.embed import embed_shards
from lookalike.artifacts import read_manifest, verify_files
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import ArtifactError, DataError, ManifestMismatch


@pytest.fixture(scope="module")
def folders(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sets")
    with ShardSet.open(shards_folder) as shard_set:
        for seed, name in enumerate(("first", "second")):
            torch.manual_seed(seed)
            encoder = create_encoder(EncoderSettings(backbone="resnet10t", input=InputSettings(size=32)))
            embed_shards(encoder, shard_set, base / name, split="test")
        train_set = embed_shards(encoder, shard_set, base / "train", split="train")
        build_index(train_set, base / "train_index")
    return {name: base / name for name in ("first", "second", "train", "train_index")}


def test_numbers_and_report_are_published_and_agree(folders: dict[str, Path], tmp_path: Path) -> None:
    summary, lines = evaluate_embedding_sets(
        [folders["first"], folders["second"]],
        with_raw_pixels=True,
        ks=(1, 5),
        out=tmp_path / "report",
        title="Test <1>",
    )
    assert list(summary["contenders"]) == ["raw pixels", "first", "second"]
    assert json.loads((tmp_path / "report" / "result.json").read_text()) == summary
    rows = pq.read_table(tmp_path / "report" / "per_query.parquet").to_pylist()
    assert len(rows) == 3 * summary["num_queries"] == 90
    mean = sum(row["R@1"] for row in rows if row["contender"] == "second") / 30
    assert summary["contenders"]["second"]["metrics"]["R@1"]["mean"] == pytest.approx(mean, abs=1e-4)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Test &lt;1&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must open without a network"
    manifest = read_manifest(tmp_path / "report", kind="evaluation", newest_version=1)
    verify_files(tmp_path / "report", manifest)
    assert any("report.html" in line for line in lines)


def test_a_flat_index_gives_the_numbers_of_brute_force(folders: dict[str, Path]) -> None:
    exact, _ = evaluate_embedding_sets([folders["train"]])
    by_index, _ = evaluate_embedding_sets([folders["train"]], index_folder=folders["train_index"])
    assert by_index["contenders"]["train"]["metrics"] == exact["contenders"]["train"]["metrics"]
    assert by_index["contenders"]["train"]["provenance"]["ranked by"] == str(folders["train_index"])


def test_sets_of_other_pictures_and_foreign_indexes_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ManifestMismatch, match="hold different pictures"):
        evaluate_embedding_sets([folders["train"], folders["first"]])
    with pytest.raises(ManifestMismatch, match="was made from embeddings"):
        evaluate_embedding_sets([folders["first"]], index_folder=folders["train_index"])


def test_a_finished_evaluation_is_read_and_another_one_replaces_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = evaluate_embedding_sets([folders["first"]], out=tmp_path / "report")
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.run.evaluate_leave_one_out", None)  # would fail if anything were measured again
        again, lines = evaluate_embedding_sets([folders["first"]], out=tmp_path / "report")
    assert again == first
    assert any("report.html" in line for line in lines)
    other, _ = evaluate_embedding_sets([folders["first"]], ks=(1, 2), out=tmp_path / "report")
    assert "R@2" in other["contenders"]["first"]["metrics"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not a finished evaluation"):
        evaluate_embedding_sets([folders["first"]], out=tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_two_evaluations_are_compared_query_by_query(folders: dict[str, Path], tmp_path: Path) -> None:
    both, _ = evaluate_embedding_sets([folders["first"], folders["second"]], out=tmp_path / "both")
    evaluate_embedding_sets([folders["first"]], out=tmp_path / "first")
    tree, lines = compare(tmp_path / "first", tmp_path / "both")
    lead = both["lead"]["second over first"]["MAP@R"]
    found = tree["metrics"]["MAP@R"]
    assert (found["difference"], found["low"], found["high"]) == pytest.approx(tuple(lead.values()), abs=1e-4)
    assert found["is_within_noise"] == (lead["low"] <= 0 <= lead["high"])
    assert 0 < found["wins"] + found["losses"] <= 30
    same, _ = compare(tmp_path / "both", tmp_path / "both")
    assert all(m["difference"] == m["wins"] == m["losses"] == 0 for m in same["metrics"].values())
    assert all(m["is_within_noise"] for m in same["metrics"].values())
    assert any("MAP@R" in line for line in lines)
    evaluate_embedding_sets([folders["train"]], out=tmp_path / "train")
    with pytest.raises(ManifestMismatch, match="only values of the same queries"):
        compare(tmp_path / "first", tmp_path / "train")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.json"):
        compare(tmp_path / "other.json", tmp_path / "first")
