"""A run that was interrupted ends as the one that was not."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lookalike.events import read_events
from tests.unit.training.small_runs import VALIDATION, interrupt, last_weights, settings_for, stop_at
from training import loop
from training.loop import take_step, train
from training.memory_budget import ChunkPlan
from training.reporting.run_record import read_record

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
