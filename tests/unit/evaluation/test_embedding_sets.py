import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.shard_set import ShardSet
from evaluation.compare import compare
from evaluation.embedding_sets import SECTION, evaluate_embedding_sets
from evaluation.result import read_result
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.sources.embeddings import EmbeddingSource
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
        build_index(EmbeddingSource(train_set), base / "train_index")
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
    result = read_result(tmp_path / "report" / "result.json").sections[SECTION]
    assert len(result.query_names) == 30
    told = summary["contenders"]["second"][SECTION]
    assert told["hit_rate@1"] == pytest.approx(100 * result.per_query["hit_rate@1"].mean())
    assert told["num_queries"] == 30
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Test &lt;1&gt;" in page
    assert page.count("first:</h4>") > 0, "the other contenders' rankings are shown, too"
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the report must open without a network"
    manifest = read_manifest(tmp_path / "report", kind="evaluation", newest_version=2)
    verify_files(tmp_path / "report", manifest)
    assert any("report.html" in line for line in lines)
    assert json.dumps(summary, allow_nan=False)


def test_a_flat_index_gives_the_numbers_of_brute_force(folders: dict[str, Path]) -> None:
    exact, _ = evaluate_embedding_sets([folders["train"]])
    by_index, _ = evaluate_embedding_sets([folders["train"]], index_folder=folders["train_index"])
    found, expected = by_index["contenders"]["train"], exact["contenders"]["train"]
    for metric in ("hit_rate@1", "hit_rate@5", "map@r", "r_precision"):
        assert found[SECTION][metric] == pytest.approx(expected[SECTION][metric], abs=1e-9)
    low, high = found[SECTION]["bounds"].get("map", [found[SECTION]["map"]] * 2)
    assert low - 1e-9 <= expected[SECTION]["map"] <= high + 1e-9
    assert found["record"]["index_type"] == "Flat"


def test_sets_of_other_pictures_and_foreign_indexes_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ManifestMismatch, match="hold different pictures"):
        evaluate_embedding_sets([folders["train"], folders["first"]])
    with pytest.raises(ManifestMismatch, match="was made from embeddings"):
        evaluate_embedding_sets([folders["first"]], index_folder=folders["train_index"])


def test_a_finished_evaluation_is_read_and_another_one_replaces_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [folders["second"], folders["first"]]
    first, told = evaluate_embedding_sets(both, out=tmp_path / "report")
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.embedding_sets.leave_one_out", None)  # would fail if anything were measured again
        again, lines = evaluate_embedding_sets(both, out=tmp_path / "report")
    assert list(again["contenders"]) == list(first["contenders"])
    assert again["contenders"]["first"][SECTION]["map@r"] == pytest.approx(
        first["contenders"]["first"][SECTION]["map@r"]
    )
    assert lines == told
    other, _ = evaluate_embedding_sets([folders["first"]], ks=(1, 2), out=tmp_path / "report")
    assert "hit_rate@2" in other["contenders"]["first"][SECTION]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not a finished evaluation"):
        evaluate_embedding_sets([folders["first"]], out=tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_two_evaluations_are_compared_query_by_query(folders: dict[str, Path], tmp_path: Path) -> None:
    both, _ = evaluate_embedding_sets([folders["first"], folders["second"]], out=tmp_path / "both")
    evaluate_embedding_sets([folders["first"]], out=tmp_path / "first")
    tree, lines = compare(tmp_path / "first", tmp_path / "both")
    lead, found = both["lead"]["second over first"]["map@r"], tree["sections"][SECTION]["map@r"]
    values = {
        name: read_result(tmp_path / name / "result.json").sections[SECTION].per_query["map@r"]
        for name in ("first", "both")
    }
    expected = 100 * (values["both"] - values["first"])
    assert found["difference"] == pytest.approx(expected.mean())
    assert (found["wins"], found["losses"]) == ((expected > 1e-9).sum(), (expected < -1e-9).sum())
    assert [found[name] for name in ("low", "high")] == pytest.approx([lead[name] for name in ("low", "high")])
    assert found["low"] < found["difference"] < found["high"]
    assert found["is_within_noise"] == (found["low"] <= 0 <= found["high"])
    assert any("map@r" in line for line in lines)
    same, _ = compare(tmp_path / "both", tmp_path / "both" / "result.json")
    assert all(m["difference"] == m["wins"] == m["losses"] == 0 for m in same["sections"][SECTION].values())
    assert all(m["is_within_noise"] for m in same["sections"][SECTION].values())
    evaluate_embedding_sets([folders["train"]], out=tmp_path / "train")
    with pytest.raises(ManifestMismatch, match="only the same queries"):
        compare(tmp_path / "first", tmp_path / "train")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.json"):
        compare(tmp_path / "other.json", tmp_path / "first")


def test_a_difference_that_only_rounding_made_is_none(folders: dict[str, Path], tmp_path: Path) -> None:
    """Values go through JSON in percent and back: 1/3 does not return to the same bits."""
    evaluate_embedding_sets([folders["first"]], out=tmp_path / "first")
    result = read_result(tmp_path / "first" / "result.json")
    shaken = {n: np.nextafter(v, 2) for n, v in result.sections[SECTION].per_query.items()}
    tree = json.loads((tmp_path / "first" / "result.json").read_text())
    tree[SECTION]["per_query"] = {name: (100 * values).tolist() for name, values in shaken.items()}
    (tmp_path / "shaken.json").write_text(json.dumps(tree))
    found, _ = compare(tmp_path / "first", tmp_path / "shaken.json")
    assert all(m["wins"] == m["losses"] == 0 for m in found["sections"][SECTION].values())
