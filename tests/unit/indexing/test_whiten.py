import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shard_set import ShardSet
from indexing.__main__ import main
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.whiten import _moments_of_classes, _moments_of_pairs, publish_whitened_encoder, whitened_encoder
from lookalike.encoder import load_encoder
from lookalike.encoder_settings import WhiteningSettings
from lookalike.errors import ArtifactError, DataError, ManifestMismatch, SettingsError
from tests.unit.data_pipelines.small_shards import write_class_folders, write_small_shards

LEARNED = WhiteningSettings(method="learned", shrinkage=0.1)


@pytest.fixture
def labels(embeddings: EmbeddingSet) -> np.ndarray:
    with ShardSet.open(embeddings.shards_folder) as shard_set:
        return shard_set.labels[embeddings.ids]


def test_pairs_of_classes_are_all_pairs_though_none_is_formed(embeddings: EmbeddingSet, labels: np.ndarray) -> None:
    vectors = embeddings.vectors().astype(np.float64)
    expected, weight = np.zeros((embeddings.dim, embeddings.dim)), 0.0
    for label in set(labels.tolist()):
        members = vectors[labels == label]
        for left, right in itertools.combinations(members, 2):
            # Every picture of a class takes part in as many pairs; by this, classes weigh by their pictures less one.
            expected += np.outer(left - right, left - right) / (len(members) / 2)
            weight += 1 / (len(members) / 2)
    found = _moments_of_classes(embeddings)
    np.testing.assert_allclose(found.covariance, expected / weight, rtol=1e-9, atol=1e-12)
    assert found.fitted_on == {"num_classes": len(set(labels.tolist())), "num_pictures_of_classes": len(labels)}


def test_pairs_of_a_file_are_those_pairs(
    embeddings: EmbeddingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexing.whiten._PAIRS_AT_ONCE", 4)
    pairs = np.random.default_rng(0).choice(embeddings.ids, (10, 2))
    np.save(tmp_path / "p.npy", pairs)
    row_of = {int(i): row for row, i in enumerate(embeddings.ids)}
    vectors = embeddings.vectors().astype(np.float64)
    differences = [vectors[row_of[int(a)]] - vectors[row_of[int(b)]] for a, b in pairs]
    found = _moments_of_pairs(embeddings, tmp_path / "p.npy")
    np.testing.assert_allclose(found.covariance, np.mean([np.outer(d, d) for d in differences], axis=0), rtol=1e-9)


def test_classes_of_one_and_pictures_without_class_match_nobody(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    encoder = load_encoder(embeddings.folder / "encoder")
    folders = write_class_folders(tmp_path / "pictures", {"a": 3, "b": 1, "c": 4})
    with write_small_shards(folders, tmp_path / "shards") as shard_set:
        some = embed_shards(encoder, shard_set, tmp_path / "e")
        assert _moments_of_classes(some).fitted_on == {"num_classes": 2, "num_pictures_of_classes": 7}
    lonely = write_class_folders(tmp_path / "lonely", {"a": 1, "b": 1})
    with write_small_shards(lonely, tmp_path / "lonely_shards") as shard_set:
        alone = embed_shards(encoder, shard_set, tmp_path / "l")
    with pytest.raises(DataError, match=r"no class has two pictures.*--pairs"):
        whitened_encoder(alone, LEARNED)
    folders.rename(tmp_path / "gone")
    more = write_class_folders(tmp_path / "more", {"a": 3, "b": 2})
    (tmp_path / "shards").rename(tmp_path / "old_shards")
    write_small_shards(more, tmp_path / "shards").close()
    with pytest.raises(ManifestMismatch, match="shards"):
        whitened_encoder(some, LEARNED)


def test_what_does_not_fit_is_refused(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    def pairs(array: np.ndarray) -> Path:
        np.save(tmp_path / "p.npy", array)
        return tmp_path / "p.npy"

    with pytest.raises(SettingsError, match="by pca takes no pairs"):
        whitened_encoder(embeddings, WhiteningSettings(), pairs=pairs(np.zeros((3, 2), int)))
    for array in (np.zeros((0, 2), int), np.zeros((3, 3), int), np.zeros(4, int), np.zeros((3, 2))):
        with pytest.raises(DataError, match="two ids per row"):
            whitened_encoder(embeddings, LEARNED, pairs=pairs(array))
    missing = int(embeddings.ids.max()) + 1
    with pytest.raises(DataError, match=f"1 pictures that have no vector in .*id {missing}"):
        whitened_encoder(embeddings, LEARNED, pairs=pairs(np.array([[int(embeddings.ids[0]), missing]])))
    (tmp_path / "garbage.npy").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"garbage\.npy cannot be read"):
        whitened_encoder(embeddings, LEARNED, pairs=tmp_path / "garbage.npy")


def test_the_command_publishes_an_encoder_that_cannot_be_whitened_twice(
    embeddings: EmbeddingSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoder"
    options = ["--method", "learned", "--dim", "6", "--shrinkage", "0.1", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(["whiten", "--embeddings", str(embeddings.folder), "--out", str(out), *options])
    assert not stop.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["dim"] == 6
    assert printed["num_vectors"] == len(embeddings.ids)
    encoder = load_encoder(out)
    assert encoder.fingerprint == whitened_encoder(embeddings, LEARNED.model_copy(update={"dim": 6})).fingerprint
    assert encoder.fingerprint != embeddings.manifest.details["encoder_fingerprint"]
    with ShardSet.open(embeddings.shards_folder) as shard_set:
        again = embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    with pytest.raises(ArtifactError, match="whitened already"):
        whitened_encoder(again, WhiteningSettings())


def test_a_repeated_command_keeps_what_is_there_and_another_one_is_refused(
    embeddings: EmbeddingSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def whiten(*options: str) -> tuple[int, str, str]:
        command = ["whiten", "--embeddings", str(embeddings.folder), "--out", str(tmp_path / "encoder"), "--json"]
        with pytest.raises(SystemExit) as stop:
            main([*command, "--method", "learned", "--shrinkage", "0.1", *options])
        return int(stop.value.code or 0), *capsys.readouterr()

    pairs, others = tmp_path / "p.npy", tmp_path / "others.npy"
    np.save(pairs, np.random.default_rng(0).choice(embeddings.ids, (10, 2)))
    np.save(others, np.random.default_rng(1).choice(embeddings.ids, (10, 2)))
    code, first, _ = whiten("--pairs", str(pairs))
    assert code == 0
    before = (tmp_path / "encoder" / "manifest.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("indexing.whiten.whitened_encoder", lambda *_, **__: pytest.fail("it was fitted again"))
        code, again, _ = whiten("--pairs", str(pairs))
        assert (code, json.loads(again)) == (0, json.loads(first))
        for options, named in (
            (["--pairs", str(others)], "pairs"),
            ([], "pairs"),
            (["--pairs", str(pairs), "--dim", "6"], "dim"),
        ):
            code, _, complaint = whiten(*options)
            assert code == 5
            assert f"{tmp_path / 'encoder'} was fitted with another {named}. Remove it" in complaint
    assert (tmp_path / "encoder" / "manifest.json").stat().st_mtime_ns == before


def test_an_encoder_without_whitening_is_not_taken_for_one_with(embeddings: EmbeddingSet) -> None:
    with pytest.raises(ArtifactError, match=r"without whitening\. Remove it"):
        publish_whitened_encoder(embeddings, embeddings.folder / "encoder", WhiteningSettings())
