import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import Tensor

from data_pipelines.shard_set import ShardSet
from lookalike.encoder import create_encoder, load_encoder, save_encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.errors import ArtifactError, DataError, NonFiniteLoss, ResourceError, SettingsError
from lookalike.events import read_events
from lookalike.settings import validate_settings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training import loop
from training.__main__ import main
from training.checkpoint import load_newest_checkpoint, save_checkpoint
from training.loop import take_step, train
from training.loss_registry import create_loss
from training.loss_settings import LossSettings
from training.losses.batch_loss import BatchLoss, LossShare
from training.losses.mixing import draw_mixing, mixing_pairs
from training.losses.recall_at_k import recall_at_k_with_gradient, surrogate_floor
from training.losses.smooth_ap import smooth_average_precision_with_gradient
from training.memory_budget import ChunkPlan
from training.reporting.run_record import read_record
from training.run_folder import describe_run, run_identity
from training.run_length import plan_batches, rows_of_run, with_num_steps
from training.settings import TrainSettings
from training.training_state import begin_or_resume
from training.validation import Validator
from training.verify_gradients import GradientCheck
from training.verify_run import verify_run, with_small_batch

CLASSES = torch.arange(6)


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
    with pytest.raises(ArtifactError, match=r"finished run with other settings: seed 0 \(now 1\)\."):
        train(settings.model_copy(update={"seed": 1}))


def test_a_folder_with_another_artifact_is_no_run_folder(shards_folder: Path, tmp_path: Path) -> None:
    save_encoder(create_encoder(EncoderSettings(backbone="resnet10t")), tmp_path / "e" / "encoder")
    with pytest.raises(ArtifactError, match="no training run"):
        train(settings_for(shards_folder, tmp_path / "e"))


def test_an_unfinished_run_with_other_settings_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    state = begin_or_resume(settings, None, classes=CLASSES)
    save_checkpoint(settings.run, state.encoder, state.state_dict(), step=1, identity="an identity", num_kept=2)
    with pytest.raises(ArtifactError, match="other settings or data"):
        train(settings)
    describe_run(settings, "an identity", batch=settings.batch)
    with pytest.raises(ArtifactError, match="other data"):
        train(settings)
    changed = settings_for(shards_folder, tmp_path / "run", optimizer={"lr": 0.5}, num_workers=1)
    with pytest.raises(ArtifactError, match=r"with other settings: optimizer\.lr 0\.\d+ \(now 0\.5\)\."):
        train(changed)


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


class LossWithoutValue(BatchLoss):
    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        return LossShare(embeddings.sum() * torch.nan, embeddings * torch.nan)


def test_a_loss_that_is_not_finite_stops_before_weights_move(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    state = begin_or_resume(settings, None, classes=CLASSES)
    before = {name: value.clone() for name, value in state.encoder.state_dict().items()}
    state.loss = LossWithoutValue()
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
        held_out = settings_for(shards_folder, tmp_path, batch={"classes_per_batch": 5}, validation=VALIDATION)
        with pytest.raises(DataError, match=r"4 classes .* Validation holds out \d+ pictures more"):
            plan_batches(held_out, shard_set, World())
        odd = settings_for(shards_folder, tmp_path, batch={"classes_per_batch": 3, "images_per_class": 3})
        with pytest.raises(SettingsError, match="do not divide over 2 processes"):
            plan_batches(odd, shard_set, World(0, 2))
        nowhere = settings_for(shards_folder, tmp_path, split="validation")
        with pytest.raises(DataError, match="validation"):
            plan_batches(nowhere, shard_set, World())


def test_pictures_without_splits_are_trained_on_as_all(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardSet.open(shards_folder) as shard_set:
        monkeypatch.setitem(shard_set.manifest.details, "splits", {"all": {}})
        with pytest.raises(DataError, match=r"no split 'train': .* Say split=null"):
            rows_of_run(settings_for(shards_folder, tmp_path), shard_set)
        rows = rows_of_run(settings_for(shards_folder, tmp_path, split=None), shard_set)
        assert rows.training.tolist() == list(range(shard_set.num_samples))


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
    ("changes", "named"),
    [({"seed": -1}, "seed"), ({"loss": {"ks": []}}, r"loss\.recall_at_k\.ks"), ({"num_steps": 0}, "num_steps")],
)
def test_impossible_settings_are_refused_at_once(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings_for(tmp_path, tmp_path, **changes)


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    encoder = {"backbone": "resnet10t", "input": {"size": 32}}
    settings = settings_for(tmp_path, tmp_path, encoder=encoder, frozen=["backbone."])
    with pytest.raises(SettingsError, match="no parameter is left"):
        begin_or_resume(settings, None, classes=CLASSES)


def test_a_warm_up_longer_than_the_run_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="warmup_steps must stay below"):
        settings_for(shards_folder, tmp_path, optimizer={"lr": 1e-3, "warmup_steps": 3})


def test_every_step_says_whether_it_taught_anything(shards_folder: Path, tmp_path: Path) -> None:
    train(settings_for(shards_folder, tmp_path / "run", tensorboard=True))
    (*_, last) = read_events(tmp_path / "run" / "events-rank0.jsonl", "step")
    shares = [name for name in last if name.startswith(("hit_rate_at_", "recall_at_", "live_", "window_", "ranked_"))]
    assert len(shares) >= 9
    assert all(0 <= last[name] <= 1 for name in shares)
    assert sum(last[name] for name in shares if name.startswith("ranked_")) == pytest.approx(1)
    assert 0 <= last["embedding_spread"] <= 1
    assert (last["rank_temperature"], last["k_temperature"], last["largest_k"]) == (0.01, 1.0, 16)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_run_of_epochs_is_the_run_of_its_steps(shards_folder: Path, tmp_path: Path) -> None:
    batch = {"classes_per_batch": 3, "images_per_class": 2}
    with ShardSet.open(shards_folder) as shard_set:
        by_steps = settings_for(shards_folder, tmp_path, num_steps=4, batch=batch)
        by_epochs = settings_for(shards_folder, tmp_path, num_steps=0, num_epochs=2, batch=batch)
        plan = plan_batches(by_epochs, shard_set, World())
        resolved = with_num_steps(by_epochs, num_steps_per_epoch=plan.num_steps_per_epoch)
        assert resolved == by_steps
        assert run_identity(resolved, shard_set) == run_identity(by_steps, shard_set)
    slow = settings_for(tmp_path, tmp_path, num_steps=4, optimizer={"lr": 1e-3, "warmup_epochs": 2})
    with pytest.raises(SettingsError, match="must stay below num_steps"):
        with_num_steps(slow, num_steps_per_epoch=2)


def gradients_of_first_step(settings: TrainSettings) -> list[Tensor]:
    state = begin_or_resume(settings, None, classes=CLASSES)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    take_step(state, pixels, torch.arange(8) // 2, settings, step=0, world=World())
    return [parameter.grad for parameter in state.encoder.parameters() if parameter.grad is not None]


def test_recomputed_activations_change_no_gradient_and_bfloat16_changes_it_little(tmp_path: Path) -> None:
    loss = {"rank_temperature": 0.1, "k_temperature": 4.0}
    plain = gradients_of_first_step(settings_for(tmp_path, tmp_path / "a", loss=loss))
    cases: list[tuple[dict[str, object], float]] = [
        ({"recomputes_activations": True}, 1e-6),
        ({"precision": "bfloat16"}, 0.3),
    ]
    for compute, tolerance in cases:
        changed = gradients_of_first_step(settings_for(tmp_path, tmp_path / "a", loss=loss, compute=compute))
        difference = torch.cat([(one - other).flatten() for one, other in zip(changed, plain, strict=True)]).norm()
        assert all(gradient.dtype == torch.float32 for gradient in changed)
        assert float(difference) <= tolerance * float(torch.cat([gradient.flatten() for gradient in plain]).norm())
        assert (float(difference) > 0) == ("precision" in compute)


def test_a_backbone_that_cannot_recompute_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(
        tmp_path,
        tmp_path / "run",
        encoder={"backbone": "resnet10t", "input": {"size": 32}},
        compute={"recomputes_activations": True},
    )

    def refuse(model: object, enable: bool = True) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr("timm.models.resnet.ResNet.set_grad_checkpointing", refuse)
    with pytest.raises(SettingsError, match=r"compute\.recomputes_activations: backbone resnet10t"):
        begin_or_resume(settings, None, classes=CLASSES)


def test_trained_batch_norms_move_their_statistics_and_need_the_chunks_of_one_process(
    shards_folder: Path, tmp_path: Path
) -> None:
    batch = {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 8}
    settings = settings_for(shards_folder, tmp_path / "run", batch_norm="trained", batch=batch)
    folder = train(settings)
    start = begin_or_resume(settings_for(shards_folder, tmp_path / "new"), None, classes=CLASSES).encoder
    trained = load_encoder(folder).state_dict()
    statistics = {name: value for name, value in start.named_buffers() if "running" in name}
    assert statistics
    assert not any(torch.equal(value, trained[name]) for name, value in statistics.items())
    with ShardSet.open(shards_folder) as shard_set, pytest.raises(SettingsError, match="2 processes must have"):
        plan_batches(settings, shard_set, World(0, 2))


CONTROLLER = {"schedule": "live_fraction", "lowest": 0.5, "highest": 4.0}


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "recall_at_k", "k_temperature": CONTROLLER, "rank_temperature": CONTROLLER},
        {"name": "contrastive", "memory_size": 12},
        {"name": "margin", "learns_boundary": True},
        {"name": "proxy_nca"},
    ],
    ids=lambda loss: str(loss["name"]),
)
def test_an_interrupted_run_goes_on_to_the_same_bits_with_all_its_state(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, object]
) -> None:
    """State of controllers, memory, learned parts of a loss, momentum, average and statistics of batch norms."""
    changes = {
        "num_steps": 4,
        "loss": loss,
        "batch_norm": "trained",
        "batch": {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 4},
        "optimizer": {"name": "sgd", "lr": 1e-2},
        "average_decay": 0.9,
        "steps_per_checkpoint": 2,
    }
    undisturbed = train(settings_for(shards_folder, tmp_path / "undisturbed", **changes))
    interrupted = settings_for(shards_folder, tmp_path / "interrupted", **changes)

    def stop_at_step_3(*arguments: Any, step: int, **options: Any) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        return take_step(*arguments, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    folder = train(interrupted)
    assert (folder / "encoder.safetensors").read_bytes() == (undisturbed / "encoder.safetensors").read_bytes()
    steps = {run: read_events(tmp_path / run / "events-rank0.jsonl", "step") for run in ("undisturbed", "interrupted")}
    assert [event["step"] for event in steps["interrupted"]] == [0, 1, 2, 2, 3]
    for name in ("loss", "gradient_norm", "k_temperature"):
        assert steps["interrupted"][-1].get(name) == steps["undisturbed"][-1].get(name)


# Two of the six classes are held out, by their names.
VALIDATION = {"class_share": 0.35, "steps_between": 1}


def stop_at(step_to_stop: int, stop: Callable[[], None]) -> Callable[..., dict[str, float]]:
    """`take_step` that calls `stop` in the given step, after its work is done."""

    def take_step_and_stop(*arguments: Any, step: int, **options: Any) -> dict[str, float]:
        measured = take_step(*arguments, step=step, **options)
        if step == step_to_stop:
            stop()
        return measured

    return take_step_and_stop


def interrupt() -> None:
    raise KeyboardInterrupt


def last_weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step_{step:06d}" / "encoder" / "encoder.safetensors").read_bytes()


def test_looking_at_held_out_classes_changes_no_bit_of_the_weights(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = {"backbone": "resnet10t", "projection_dim": 8, "drop_rate": 0.3, "input": {"size": 32}}
    train(settings_for(shards_folder, tmp_path / "on", validation=VALIDATION, encoder=encoder))
    monkeypatch.setattr("training.loop.create_validator", lambda *arguments: None)
    train(settings_for(shards_folder, tmp_path / "off", validation=VALIDATION, encoder=encoder))
    assert last_weights(tmp_path / "on", 3) == last_weights(tmp_path / "off", 3)
    assert len(read_events(tmp_path / "on" / "events-rank0.jsonl", "validation")) == 3
    assert read_events(tmp_path / "off" / "events-rank0.jsonl", "validation") == []


def test_the_best_checkpoint_becomes_the_encoder_and_patience_ends_the_run(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.8, 0.8, 0.7, 0.9])
    monkeypatch.setattr(Validator, "validate", lambda self, encoder: {"value": next(values)})
    run = tmp_path / "run"
    validation = {**VALIDATION, "patience": 2}
    settings = settings_for(shards_folder, run, num_steps=5, validation=validation, num_kept_checkpoints=1)
    folder = train(settings)
    assert [event["step"] for event in read_events(run / "events-rank0.jsonl", "step")] == [0, 1, 2, 3]
    assert (folder / "encoder.safetensors").read_bytes() == last_weights(run, 2) != last_weights(run, 4)
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == 2
    # Killed before the encoder was written, the run knows that it is over.
    shutil.rmtree(folder)
    assert (train(settings) / "encoder.safetensors").read_bytes() == last_weights(run, 2)
    assert len(read_events(run / "events-rank0.jsonl", "step")) == 4


@pytest.mark.parametrize("in_background", [False, True])
def test_an_interrupted_run_chooses_the_checkpoint_of_an_undisturbed_one(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    changes = {"num_steps": 5, "validation": VALIDATION, "steps_per_checkpoint": 2}
    train(settings_for(shards_folder, tmp_path / "undisturbed", **changes))
    changes["writes_checkpoints_in_background"] = in_background
    interrupted = settings_for(shards_folder, tmp_path / "interrupted", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop_at(3, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    train(interrupted)
    undisturbed = tmp_path / "undisturbed"
    assert last_weights(interrupted.run, 5) == last_weights(undisturbed, 5)
    for name in ("checkpoints/best.json", "encoder/encoder.safetensors"):
        assert (interrupted.run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert len(read_record(interrupted.run)["starts"]) == 2


def test_sigterm_finishes_the_step_saves_it_and_leaves(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(settings_for(shards_folder, tmp_path / "undisturbed", num_steps=4))
    settings = settings_for(shards_folder, tmp_path / "stopped", num_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop_at(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) as stopped:
            train(settings)
    assert stopped.value.code == 143
    folder = train(settings)
    assert (folder / "encoder.safetensors").read_bytes() == (undisturbed / "encoder.safetensors").read_bytes()
    steps = [event["step"] for event in read_events(settings.run / "events-rank0.jsonl", "step")]
    assert steps == [0, 1, 2, 3], "no step was done twice"


def test_chosen_chunks_stay_those_of_the_run_and_kept_ones_change_nothing(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = {"backbone": "resnet10t", "projection_dim": 8, "drop_rate": 0.3, "input": {"size": 32}}
    batch = {"classes_per_batch": 4, "images_per_class": 2}
    changes = {"num_steps": 4, "encoder": encoder, "steps_per_checkpoint": 2}
    fixed = train(settings_for(shards_folder, tmp_path / "fixed", **changes, batch={**batch, "chunk_size": 3}))
    auto = {**batch, "chunk_size": "auto", "num_kept_chunks": "auto", "memory_budget": 10**9}
    asked: list[tuple[int, int | None]] = []

    def choose(*arguments: object, budget_bytes: int, chunk_size: int | None, **options: object) -> ChunkPlan:
        """First 3 pictures, one kept; today's machine would choose 5, and keeps two."""
        asked.append((budget_bytes, chunk_size))
        size, kept = (3, 1) if len(asked) == 1 else (chunk_size or 5, 2)
        return ChunkPlan(size, kept, 3, 1, 1, budget_bytes, 1.0)

    monkeypatch.setattr("training.passes.choose_chunks", choose)
    settings = settings_for(shards_folder, tmp_path / "auto", **changes, batch=auto)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop_at(2, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    folder = train(settings)
    assert asked == [(10**9, None), (10**9, 3)]
    assert (folder / "encoder.safetensors").read_bytes() == (fixed / "encoder.safetensors").read_bytes()
    written = yaml.safe_load((settings.run / "settings.yaml").read_text())["batch"]
    assert (written["chunk_size"], written["num_kept_chunks"]) == (3, 2)


def test_chunks_are_measured_where_the_settings_leave_them_to_the_machine(shards_folder: Path, tmp_path: Path) -> None:
    batch = {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 4, "num_kept_chunks": "auto"}
    settings = settings_for(shards_folder, tmp_path, batch=batch)
    state = begin_or_resume(settings, None, classes=CLASSES)
    assert (state.passes.chunk_size, state.passes.num_kept_chunks) == (4, 2), "two chunks of a few MB fit anywhere"
    tight = settings_for(shards_folder, tmp_path, batch={**batch, "memory_budget": 1000})
    with pytest.raises(ResourceError, match=r"Raise batch\.memory_budget"):
        begin_or_resume(tight, None, classes=CLASSES)


def train_on_rank(world: World, shards: Path, run: Path, backend: dict[str, object]) -> None:
    """Interrupted after step 1, and gone on with."""
    settings = settings_for(
        shards, run, backend=backend, optimizer={"lr": 1e-4, "max_gradient_norm": 0.1}, steps_per_checkpoint=1
    )
    original = loop.take_step
    loop.take_step = stop_at(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings, world=world)
    loop.take_step = original
    train(settings, world=world)


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_two_processes_of_every_back_end_train_the_encoder_of_one(
    shards_folder: Path, tmp_path: Path, name: str
) -> None:
    """Another back end may also go on with the run: it is the same one."""
    train_on_rank(World(), shards_folder, tmp_path / "one", {"name": "single"})
    run_on_ranks(train_on_rank, 2, shards_folder, tmp_path / "two", {"name": name})
    one = load_encoder(tmp_path / "one" / "encoder").state_dict()
    two = load_encoder(tmp_path / "two" / "encoder").state_dict()
    for key, value in one.items():
        # Three steps of 1e-4; Adam turns rounding of vanishing gradients into a step for a few weights.
        assert float((two[key].double() - value.double()).abs().mean()) < 1e-6, key
    with ShardSet.open(shards_folder) as shard_set:
        identities = {
            run_identity(settings_for(shards_folder, tmp_path, backend={"name": backend}), shard_set)
            for backend in ("single", name)
        }
    assert len(identities) == 1


def validate_on_rank(world: World, shards: Path, run: Path, backend: dict[str, object]) -> None:
    settings = settings_for(shards, run, backend=backend, optimizer={"lr": 1e-4}, validation=VALIDATION, num_steps=2)
    train(settings, world=world)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param({"name": "fsdp2", "smallest_unit": 500}, id="fsdp2"),
        pytest.param(
            {"name": "deepspeed", "zero_stage": 3, "largest_whole_parameter": 0},
            id="zero3",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no extra [deepspeed]"),
            ],
        ),
    ],
)
def test_spread_weights_are_validated_as_whole_ones(
    shards_folder: Path, tmp_path: Path, backend: dict[str, object]
) -> None:
    validate_on_rank(World(), shards_folder, tmp_path / "one", {"name": "single"})
    run_on_ranks(validate_on_rank, 2, shards_folder, tmp_path / "two", backend)
    one = read_events(tmp_path / "one" / "events-rank0.jsonl", "validation")
    for rank in (0, 1):
        found = read_events(tmp_path / "two" / f"events-rank{rank}.jsonl", "validation")
        assert [event["value"] for event in found] == pytest.approx([event["value"] for event in one], abs=1e-3)
        assert [event["step"] for event in found] == [1, 2]
    # Validated as it will be found: the encoder of the best checkpoint has the value that chose it.
    best = json.loads((tmp_path / "two" / "checkpoints" / "best.json").read_text())
    encoder = load_encoder(tmp_path / "two" / "encoder")
    with ShardSet.open(shards_folder) as shard_set:
        settings = settings_for(shards_folder, tmp_path, validation=VALIDATION)
        validator = loop.create_validator(settings, shard_set, World())
        assert validator is not None
        assert validator.validate(encoder)["value"] == pytest.approx(best["value"], abs=1e-6)


def test_a_back_end_that_cannot_do_what_is_asked_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    settings = settings_for("nowhere", tmp_path, backend={"name": "fsdp2"}, loss={"name": "proxy_nca"})
    with pytest.raises(SettingsError, match="parameters of its own"):
        train(settings, world=World(0, 2))
    with pytest.raises(SettingsError, match="found 1"):
        train(settings)


class LossWithInfiniteGradient(BatchLoss):
    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        return LossShare(embeddings.sum(), embeddings * torch.inf)


def test_a_gradient_that_is_not_finite_stops_before_weights_move(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    state = begin_or_resume(settings, None, classes=CLASSES)
    before = {name: value.clone() for name, value in state.encoder.state_dict().items()}
    state.loss = LossWithInfiniteGradient()
    pixels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(NonFiniteLoss, match=r"step 5: loss .*, gradient norm nan"):
        take_step(state, pixels, torch.arange(8) // 2, settings, step=5, world=World())
    for name, value in state.encoder.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["recall_at_k", "smooth_ap"])
def test_mixing_some_pairs_is_the_loss_of_these_pairs(name: str) -> None:
    tree = {"name": name, "mixes_similarities": True, "mixing": {"share": 0.5, "beta": [2.0, 2.0]}}
    loss = create_loss(TypeAdapter(LossSettings).validate_python(tree), dim=8, classes=CLASSES, seed=3)
    labels = torch.arange(24) // 4
    embeddings = torch.nn.functional.normalize(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    mixing = draw_mixing(labels, seed=3, step=7, share=0.5, beta=(2.0, 2.0))
    assert 0 < len(mixing.pairs) < len(mixing_pairs(labels))
    function = recall_at_k_with_gradient if name == "recall_at_k" else smooth_average_precision_with_gradient
    expected = function(embeddings, labels, rank_temperature=0.01, mixing=mixing)
    found = loss(embeddings, labels, share=(0, 1), step=7)
    assert torch.equal(found.loss, expected.loss)
    assert expected.gradient is not None
    assert torch.equal(found.gradient, expected.gradient)
    floor = surrogate_floor(labels, mixing=mixing) if name == "recall_at_k" else 0.0
    assert loss.floor(labels, step=7) == floor
    assert floor <= float(found.loss)


@pytest.mark.parametrize("loss", [{"mixes_similarities": True}, {"name": "proxy_nca"}, {"name": "contrastive"}])
def test_the_gradients_of_a_run_are_verified_with_its_own_loss(
    shards_folder: Path, tmp_path: Path, loss: dict[str, object]
) -> None:
    batch = {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": "auto", "num_kept_chunks": "auto"}
    settings = settings_for(shards_folder, tmp_path / "run", loss=loss, batch=batch)
    checks = verify_run(settings, world=World())
    assert [check.precision for check in checks] == ["float32", "float64"]
    assert all(check.has_passed for check in checks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("classes", [24, 1200])
def test_the_batch_of_the_check_is_small_and_divides(tmp_path: Path, classes: int, world_size: int) -> None:
    batch = {"classes_per_batch": classes, "images_per_class": 4, "chunk_size": 50}
    small = with_small_batch(settings_for(tmp_path, tmp_path, batch=batch), World(0, world_size)).batch
    assert small.num_images % world_size == 0
    num_pictures = small.num_images // world_size
    assert min(32, classes * 4 // world_size) <= num_pictures <= 64
    assert isinstance(small.chunk_size, int)
    assert num_pictures % small.chunk_size == 0
    assert small.chunk_size <= 50


def test_gradients_that_differ_give_exit_code_1(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(settings_for(shards_folder, tmp_path / "run", num_threads=1).model_dump(mode="json")))
    for difference, code in ((1.0, 1), (0.0, 0)):
        check = GradientCheck("ddp", 2, "float32", {"backbone.conv1": difference})
        monkeypatch.setattr("training.verify_run.verify_gradients", lambda *args, check=check, **options: [check])
        with pytest.raises(SystemExit) as ended:
            main([str(config), "--verify-gradients"])
        assert ended.value.code == code
        assert ("FAILED: backend ddp over 2 processes" in capsys.readouterr().out) == bool(code)


def test_a_report_reads_the_runs_that_training_wrote(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        train(settings_for(shards_folder, tmp_path / str(seed), seed=seed, validation=VALIDATION), command="a command")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "report"), "--json"])
    assert ended.value.code == 0
    tree = json.loads(capsys.readouterr().out)
    assert [(run["seed"], run["steps"], run["is_finished"]) for run in tree["runs"]] == [(0, 3, True), (1, 3, True)]
    [recipe] = tree["recipes"]
    assert recipe["num_seeds"] == 2, "they differ by their seed alone"
    assert recipe["means"]["best_validation"]["mean"] > 0
    assert (tmp_path / "report" / "report.html").exists()
    records = [read_record(tmp_path / str(seed)) for seed in (0, 1)]
    assert records[0]["recipe"] == records[1]["recipe"]
    assert records[0]["identity"] != records[1]["identity"]
    assert records[0]["starts"][0]["command"] == "a command"


@pytest.mark.slow
# torch's compiler defines a script method when it is loaded.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_a_compiled_backbone_gives_the_gradient_of_a_plain_one(tmp_path: Path) -> None:
    loss = {"rank_temperature": 0.1, "k_temperature": 4.0}
    plain = gradients_of_first_step(settings_for(tmp_path, tmp_path / "a", loss=loss))
    compiled = gradients_of_first_step(
        settings_for(tmp_path, tmp_path / "a", loss=loss, compute={"compiles_backbone": True})
    )
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
