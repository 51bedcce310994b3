import json
from pathlib import Path

import fsspec
import pytest
import torch

from data_pipelines.shard_set import ShardSet
from lookalike.encoder import create_encoder, load_encoder, save_encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.errors import ArtifactError, DataError, NonFiniteLoss, SettingsError
from lookalike.events import read_events
from lookalike.settings import validate_settings
from lookalike.world import World
from training import loop
from training.checkpoint import load_newest_checkpoint, save_checkpoint
from training.loop import begin_or_resume, plan_batches, run_identity, take_step, train
from training.settings import TrainSettings


def settings_for(shards: Path | str, run: Path, **changes: object) -> TrainSettings:
    tree: dict[str, object] = {
        "shards": str(shards),
        "run": run,
        "num_steps": 3,
        "batch": {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 3},
        "encoder": {"backbone": "resnet10t", "projection_dim": 8, "input": {"size": 32}},
        "optimizer": {"lr": 1e-3},
        "num_workers": 0,
    }
    return validate_settings(TrainSettings, {**tree, **changes}, where="test")


def test_training_lowers_the_loss_on_the_pictures_it_sees(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run", num_steps=30, loss={"rank_temperature": 0.1, "ks": [1, 2]})
    folder = train(settings)
    steps = read_events(tmp_path / "run" / "events-rank0.jsonl", "step")
    assert [event["step"] for event in steps] == list(range(30))
    assert sum(e["loss_above_floor"] for e in steps[-4:]) < 0.7 * sum(e["loss_above_floor"] for e in steps[:4])
    assert all(event["loss_above_floor"] > 0 for event in steps)
    assert (folder / "encoder.safetensors").exists()
    assert (tmp_path / "run" / "settings.yaml").read_text().startswith("# Resolved settings")


def test_a_finished_run_is_reused_and_another_one_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run", num_steps=1)
    folder = train(settings)
    before = (folder / "encoder.safetensors").stat().st_mtime_ns
    assert train(settings) == folder
    assert train(settings.model_copy(update={"num_workers": 1, "steps_per_checkpoint": 7})) == folder
    assert (folder / "encoder.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="other settings or data"):
        train(settings.model_copy(update={"seed": 1}))


def test_a_folder_with_another_artifact_is_no_run_folder(shards_folder: Path, tmp_path: Path) -> None:
    save_encoder(create_encoder(EncoderSettings(backbone="resnet10t")), tmp_path / "e" / "encoder")
    with pytest.raises(ArtifactError, match="no training run"):
        train(settings_for(shards_folder, tmp_path / "e"))


def test_an_unfinished_run_with_other_settings_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    with ShardSet.open(shards_folder) as shard_set:
        state = begin_or_resume(settings, "an identity")
        save_checkpoint(settings.run, state.encoder, state.state_dict(), step=1, identity="an identity", num_kept=2)
        with pytest.raises(ArtifactError, match="other settings or data"):
            begin_or_resume(settings, run_identity(settings, shard_set))


def test_a_damaged_checkpoint_is_passed_over_and_old_ones_are_removed(tmp_path: Path) -> None:
    encoder = create_encoder(EncoderSettings(backbone="resnet10t"))
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, encoder, {"some": step}, step=step, identity="x", num_kept=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000002", "step_000003"]
    file = tmp_path / "checkpoints" / "step_000003" / "training_state.pt"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (2, {"some": 2})
    # A checkpoint's encoder is one to embed with.
    assert load_encoder(tmp_path / "checkpoints" / "step_000002" / "encoder").fingerprint == encoder.fingerprint
    assert load_newest_checkpoint(tmp_path / "empty", identity="x") is None


def test_after_damage_the_run_goes_on_from_before_it_and_keeps_what_it_writes(tmp_path: Path) -> None:
    encoder = create_encoder(EncoderSettings(backbone="resnet10t"))
    for step in (100, 200):
        save_checkpoint(tmp_path, encoder, {}, step=step, identity="x", num_kept=2)
    (tmp_path / "checkpoints" / "step_000200" / "training_state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, encoder, {}, step=110, identity="x", num_kept=1)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert checkpoint.step == 110
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, encoder, {}, step=step, identity="x", num_kept=1)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert checkpoint.step == 1_000_000


def test_a_checkpoint_of_a_newer_program_is_not_taken_for_damage(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path, create_encoder(EncoderSettings(backbone="resnet10t")), {}, step=1, identity="x", num_kept=1
    )
    manifest = tmp_path / "checkpoints" / "step_000001" / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "format_version": 99, "a_new_field": 1}))
    with pytest.raises(ArtifactError, match="Upgrade lookalike"):
        load_newest_checkpoint(tmp_path, identity="x")


def test_a_loss_that_is_not_finite_stops_before_weights_move(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    state = begin_or_resume(settings, "x")
    before = {name: value.clone() for name, value in state.encoder.state_dict().items()}
    monkeypatch.setattr(loop, "recall_at_k_surrogate", lambda rows, *_, **__: rows.sum() * torch.nan)
    pixels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(NonFiniteLoss, match="step 5: loss nan"):
        take_step(state, pixels, torch.arange(8) // 2, settings, step=5, world=World())
    for name, value in state.encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_batches_that_cannot_be_made_are_refused_by_name(shards_folder: Path, tmp_path: Path) -> None:
    with ShardSet.open(shards_folder) as shard_set:
        settings = settings_for(shards_folder, tmp_path, batch={"classes_per_batch": 7})
        with pytest.raises(DataError, match="7 classes per batch"):
            plan_batches(settings, shard_set, World())
        odd = settings_for(shards_folder, tmp_path, batch={"classes_per_batch": 3, "images_per_class": 3})
        with pytest.raises(SettingsError, match="do not divide over 2 processes"):
            plan_batches(odd, shard_set, World(0, 2))
        nowhere = settings_for(shards_folder, tmp_path, split="validation")
        with pytest.raises(DataError, match="validation"):
            plan_batches(nowhere, shard_set, World())


def test_shards_at_an_address_train_the_encoder_of_the_folder(shards_folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{shards_folder}/", "/remote/shards/", recursive=True)
    cache = {"folder": tmp_path / "cache"}
    local = train(settings_for(shards_folder, tmp_path / "local", num_steps=2))
    address = "memory://remote/shards"
    remote = train(settings_for(address, tmp_path / "remote", num_steps=2, shard_cache=cache))
    assert (remote / "encoder.safetensors").read_bytes() == (local / "encoder.safetensors").read_bytes()
    with pytest.raises(SettingsError, match=r"shard_cache\.folder"):
        settings_for(address, tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"), [({"seed": -1}, "seed"), ({"loss": {"ks": []}}, "loss.ks"), ({"num_steps": 0}, "num_steps")]
)
def test_impossible_settings_are_refused_at_once(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings_for(tmp_path, tmp_path, **changes)


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    encoder = {"backbone": "resnet10t", "input": {"size": 32}}
    with pytest.raises(SettingsError, match="no parameter is left"):
        begin_or_resume(settings_for(tmp_path, tmp_path, encoder=encoder, frozen=["backbone."]), "x")


def test_a_warm_up_longer_than_the_run_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="warmup_steps must stay below"):
        settings_for(shards_folder, tmp_path, optimizer={"lr": 1e-3, "warmup_steps": 3})
