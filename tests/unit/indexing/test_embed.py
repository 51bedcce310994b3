import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import EvaluationTransform
from indexing import embed as embed_module
from indexing import embedding_set as embedding_set_module
from indexing.__main__ import main
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.settings import EmbedSettings
from indexing.whiten import whitened_encoder
from lookalike.encoder import Encoder, create_encoder, embed_pixels, load_encoder, save_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings, WhiteningSettings
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError
from lookalike.world import World
from tests.unit.data_pipelines.small_shards import write_class_folders, write_small_shards


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    settings = EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32))
    return create_encoder(settings).eval()


def slow_vectors(encoder: Encoder, shard_set: ShardSet, rows: np.ndarray) -> np.ndarray:
    """The oracle: every picture on its own, by random access."""
    transform = EvaluationTransform(encoder.settings.input)
    pixels = [transform(decode_image(shard_set.read_bytes(int(row)))) for row in rows]
    return np.concatenate([embed_pixels(encoder, torch.from_numpy(p)[None]).numpy() for p in pixels])


def test_every_picture_of_the_split_is_embedded_under_its_own_id(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path
) -> None:
    embeddings = embed_shards(encoder, shard_set, tmp_path / "e", split="test", settings=EmbedSettings(batch_size=7))
    rows = shard_set.rows("test")
    assert sorted(embeddings.ids.tolist()) == rows.tolist()
    expected = slow_vectors(encoder, shard_set, embeddings.ids)
    np.testing.assert_allclose(embeddings.vectors(), expected, atol=1e-5)
    assert embeddings.skipped == []
    # Plain files that others can read.
    block = sorted((tmp_path / "e" / "blocks").glob("*.npy"))[0]
    assert np.load(block).shape[1] == 16
    assert pq.read_table(block.with_suffix(".parquet")).column_names == ["id", "key"]


def test_pictures_of_many_shapes_and_scales_are_embedded_in_order(tmp_path: Path) -> None:
    shard_set = write_small_shards(write_class_folders(tmp_path / "pictures", {"a": 9, "b": 8}), tmp_path / "shards")
    torch.manual_seed(0)
    whole = InputSettings(size=32, max_side=40, scales=(0.75, 1.0))
    encoder = create_encoder(EncoderSettings(backbone="resnet10t", projection_dim=16, input=whole)).eval()
    embeddings = embed_shards(encoder, shard_set, tmp_path / "e", settings=EmbedSettings(batch_size=5))
    assert embeddings.ids.tolist() == shard_set.rows().tolist()
    np.testing.assert_allclose(embeddings.vectors(), slow_vectors(encoder, shard_set, embeddings.ids), atol=1e-5)


def test_the_number_of_ranks_changes_nothing(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    alone = embed_shards(encoder, shard_set, tmp_path / "alone")
    monkeypatch.setattr(embed_module, "barrier", lambda world: None)
    # Rank 1 of 2 first: it only fills blocks. Rank 0 finds them, adds its own and publishes.
    staging = embed_module.staging_folder(tmp_path / "both")
    embed_module._prepare_staging(staging, identity=_identity(encoder, shard_set))
    with pytest.raises(ArtifactError, match="not a finished"):
        embed_shards(encoder, shard_set, tmp_path / "both", world=World(1, 2))
    both = embed_shards(encoder, shard_set, tmp_path / "both", world=World(0, 2))
    assert both.fingerprint == alone.fingerprint
    assert both.vectors().tobytes() == alone.vectors().tobytes()


def _identity(encoder: Encoder, shard_set: ShardSet) -> dict[str, object]:
    return embed_module.embedding_identity(encoder, shard_set, split=None, settings=EmbedSettings())


def test_a_rerun_continues_and_ends_with_the_same_bytes(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embed_shards(encoder, shard_set, tmp_path / "whole")
    embedded: list[str] = []
    original = embed_module._embed_shard

    def embed_until_killed(encoder, shard_set, name, *rest):  # type: ignore[no-untyped-def]
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(name)
        return original(encoder, shard_set, name, *rest)

    monkeypatch.setattr(embed_module, "_embed_shard", embed_until_killed)
    with pytest.raises(KeyboardInterrupt):
        embed_shards(encoder, shard_set, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    first_part = list(embedded)
    embedded[:] = ["", "", ""]  # never equal to 2 again
    resumed = embed_shards(encoder, shard_set, tmp_path / "resumed")
    assert resumed.fingerprint == whole.fingerprint
    assert not set(first_part) & set(embedded[3:])
    assert not embed_module.staging_folder(tmp_path / "resumed").exists()


def embed_until_killed_inside_the_third_block(shards_folder: Path, encoder_folder: Path, folder: Path) -> None:
    original, num_tables = embedding_set_module.pq.write_table, 0

    def write_table(*arguments: object) -> None:
        nonlocal num_tables
        num_tables += 1
        if num_tables == 5:  # a block has two
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    embedding_set_module.pq.write_table = write_table
    with ShardSet.open(shards_folder) as shard_set:
        embed_shards(load_encoder(encoder_folder), shard_set, folder)


def test_a_killed_process_is_continued_to_the_same_bytes(encoder: Encoder, shards_folder: Path, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path / "encoder")
    folder = tmp_path / "e"
    process = multiprocessing.get_context("forkserver").Process(
        target=embed_until_killed_inside_the_third_block, args=(shards_folder, tmp_path / "encoder", folder)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert not folder.exists()
    finished = sorted((embed_module.staging_folder(folder) / "blocks").glob("*.skipped.parquet"))
    assert len(finished) == 2
    with ShardSet.open(shards_folder) as shard_set:
        write, kept = embed_module.write_block, []
        whole = embed_shards(encoder, shard_set, tmp_path / "whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embed_module, "write_block", lambda *block: (kept.append(block[1]), write(*block)))
            resumed = embed_shards(load_encoder(tmp_path / "encoder"), shard_set, folder)
        assert len(kept) == len(shard_set.shard_names) - len(finished)
    assert resumed.fingerprint == whole.fingerprint


def test_a_finished_set_is_reused_and_another_one_is_refused(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    monkeypatch.setattr(embed_module, "_embed_shard", None)  # would fail if anything were embedded again
    assert embed_shards(encoder, shard_set, tmp_path / "e", split="test").fingerprint == first.fingerprint
    with pytest.raises(ArtifactError, match="another split"):
        embed_shards(encoder, shard_set, tmp_path / "e", split="train")


def test_skipped_pictures_are_named_counted_and_shift_nothing(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that decoded when the shards were written fails now, as after a change of decoder."""
    bad_row = int(shard_set.rows("test")[3])
    bad_bytes = shard_set.read_bytes(bad_row)

    def decode(data: bytes, **options: object) -> Image.Image:
        from lookalike.errors import DecodeError

        if data == bad_bytes:
            raise DecodeError("truncated", "cut off")
        return decode_image(data)

    monkeypatch.setattr("data_pipelines.loader.decode_image", decode)
    embeddings = embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    assert [(s.id, s.key, s.reason) for s in embeddings.skipped] == [
        (bad_row, shard_set.samples["key"][bad_row].as_py(), "truncated")
    ]
    assert bad_row not in embeddings.ids
    np.testing.assert_allclose(embeddings.vectors(), slow_vectors(encoder, shard_set, embeddings.ids), atol=1e-5)
    assert embeddings.manifest.details["num_skipped"] == 1


def test_half_precision_halves_the_file_and_reads_as_float32(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path
) -> None:
    full = embed_shards(encoder, shard_set, tmp_path / "full", split="test")
    half = embed_shards(encoder, shard_set, tmp_path / "half", split="test", settings=EmbedSettings(storage="float16"))
    assert half.vectors().dtype == np.float32
    np.testing.assert_allclose(half.vectors(), full.vectors(), atol=1e-3)


def test_threads_decide_nothing(encoder: Encoder, shard_set: ShardSet, tmp_path: Path) -> None:
    """Processes that share a machine have fewer threads each, and products may be summed in another order by them."""
    before = torch.get_num_threads()
    try:
        found = set()
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            # Batches that do not divide evenly are what differs.
            settings = EmbedSettings(batch_size=11)
            embeddings = embed_shards(encoder, shard_set, tmp_path / f"{num_threads}", settings=settings)
            found.add(embeddings.vectors().tobytes())
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_bfloat16_is_another_set_whose_vectors_are_near(encoder: Encoder, shard_set: ShardSet, tmp_path: Path) -> None:
    full = embed_shards(encoder, shard_set, tmp_path / "full", split="test")
    coarse = EmbedSettings(precision="bfloat16")
    near = embed_shards(encoder, shard_set, tmp_path / "near", split="test", settings=coarse)
    assert near.manifest.settings["precision"] == "bfloat16"
    cosines = (near.vectors() * full.vectors()).sum(axis=1)
    # bfloat16 keeps 8 bits, so each of some ten layers adds an error of up to 2^-8 to vectors of unit length.
    assert 1 - (10 * 2**-8) ** 2 < cosines.min() < 1 - 1e-7
    with pytest.raises(ArtifactError, match="another precision"):
        embed_shards(encoder, shard_set, tmp_path / "near", split="test")


def test_a_set_made_before_there_was_a_precision_is_reused(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path
) -> None:
    first = embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    manifest = tmp_path / "e" / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["settings"]["precision"]
    manifest.write_text(json.dumps(tree))
    assert embed_shards(encoder, shard_set, tmp_path / "e", split="test").fingerprint == first.fingerprint


def test_a_whitened_encoder_embeds_whitened_vectors_and_says_so(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path
) -> None:
    plain = embed_shards(encoder, shard_set, tmp_path / "plain", split="train")
    whitened = whitened_encoder(plain, WhiteningSettings(dim=5, shrinkage=0.1))
    assert whitened.whitening is not None
    embeddings = embed_shards(whitened, shard_set, tmp_path / "whitened", split="train")
    assert embeddings.dim == embeddings.vectors().shape[1] == 5
    expected = whitened.whitening(torch.from_numpy(plain.vectors())).numpy()
    np.testing.assert_allclose(embeddings.vectors(), expected, atol=1e-5)
    details = embeddings.manifest.details
    assert details["whitening"] == {"method": "pca", "dim": 5, "shrinkage": 0.1, "power": 0.5}
    assert details["whitening_fingerprint"] == whitened.whitening.fingerprint
    assert "whitening" not in plain.manifest.details
    # What travels with the vectors is the encoder that queries need.
    assert load_encoder(embeddings.folder / "encoder").fingerprint == details["encoder_fingerprint"]
    with pytest.raises(ArtifactError, match="another encoder"):
        embed_shards(encoder, shard_set, tmp_path / "whitened", split="train")


def test_the_command_takes_settings_of_the_step_and_of_the_input(
    encoder: Encoder, shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(encoder, tmp_path / "encoder")
    options = ["--encoder", str(tmp_path / "encoder"), "--split", "test", "--input", "max_side=40", "--json"]
    options += ["--input", "scales=[1, 0.5]", "--out", str(tmp_path / "e")]
    with pytest.raises(SystemExit) as stop:
        main(["embed", str(shards_folder), "precision=bfloat16", "storage=float16", *options])
    assert not stop.value.code
    embeddings = EmbeddingSet.open(tmp_path / "e")
    assert json.loads(capsys.readouterr().out)["vectors"] == len(embeddings.ids)
    assert embeddings.manifest.settings == {"batch_size": 64, "precision": "bfloat16", "storage": "float16"}
    stored = load_encoder(tmp_path / "e" / "encoder")
    assert stored.settings.input == InputSettings(size=32, max_side=40, scales=(1.0, 0.5))
    assert stored.fingerprint == embeddings.manifest.parents["encoder"] != encoder.fingerprint
    with pytest.raises(SystemExit) as stop:
        main(["embed", str(shards_folder), "precision=float8", *options])
    assert stop.value.code == 2
    assert "precision" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["embed", str(shards_folder), "--image-size", "64", *options])
    assert stop.value.code == 2
    assert "--image-size belongs to --pretrained" in capsys.readouterr().err


def test_an_empty_split_and_damaged_blocks_are_named(encoder: Encoder, shard_set: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'validation'; it has test, train"):
        embed_shards(encoder, shard_set, tmp_path / "e", split="validation")
    embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    block = sorted((tmp_path / "e" / "blocks").glob("*.npy"))[0]
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=block.name):
        EmbeddingSet.open(tmp_path / "e").check()


def test_staging_of_another_encoder_is_thrown_away(encoder: Encoder, shard_set: ShardSet, tmp_path: Path) -> None:
    staging = embed_module.staging_folder(tmp_path / "e")
    (staging / "blocks").mkdir(parents=True)
    (staging / "identity.json").write_text(json.dumps({"encoder": "another"}))
    shutil.copy(Path(__file__), staging / "blocks" / "stale.npy")
    embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    assert not (tmp_path / "e" / "blocks" / "stale.npy").exists()


def test_a_folder_in_the_way_is_not_touched(encoder: Encoder, shard_set: ShardSet, tmp_path: Path) -> None:
    in_the_way = embed_module.staging_folder(tmp_path / "e")
    in_the_way.mkdir()
    (in_the_way / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="in the way"):
        embed_shards(encoder, shard_set, tmp_path / "e")
    assert (in_the_way / "mine.txt").read_text() == "mine"


def test_vectors_of_an_older_transform_are_not_reused(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_shards(encoder, shard_set, tmp_path / "e", split="test")
    smaller_batches = EmbedSettings(batch_size=3)
    embed_shards(encoder, shard_set, tmp_path / "e", split="test", settings=smaller_batches)  # decides nothing
    monkeypatch.setattr("lookalike.encoder_settings.TRANSFORM_VERSION", 99)
    with pytest.raises(ArtifactError, match="another transform"):
        embed_shards(encoder, shard_set, tmp_path / "e", split="test")


def test_moved_together_with_its_shards_it_still_finds_them(
    encoder: Encoder, shards_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards_folder, tmp_path / "before" / "shards")
    with ShardSet.open(tmp_path / "before" / "shards") as shard_set:
        embed_shards(encoder, shard_set, tmp_path / "before" / "sets" / "e", split="test")
    (tmp_path / "before").rename(tmp_path / "after")
    assert EmbeddingSet.open(tmp_path / "after" / "sets" / "e").shards_folder == tmp_path / "after" / "shards"
    (tmp_path / "after" / "sets" / "e").rename(tmp_path / "moved_alone")
    (tmp_path / "after").rename(tmp_path / "before")
    assert EmbeddingSet.open(tmp_path / "moved_alone").shards_folder == tmp_path / "before" / "shards"
