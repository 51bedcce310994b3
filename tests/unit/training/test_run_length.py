"""Which batches a run has, and how many steps."""

from pathlib import Path

import pytest

from data_pipelines.shard_set import ShardSet
from lookalike.errors import DataError, SettingsError
from lookalike.world import World
from tests.unit.training.small_runs import VALIDATION, settings_for
from training.run_folder import run_identity
from training.run_length import plan_batches, rows_of_run, with_num_steps


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


def test_a_warm_up_longer_than_the_run_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="warmup_steps must stay below"):
        settings_for(shards_folder, tmp_path, optimizer={"lr": 1e-3, "warmup_steps": 3})


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
    drops = {"lr": 1e-3, "schedule": "step", "unit": "epoch", "milestones": [1, 2]}
    inert = settings_for(tmp_path, tmp_path, num_steps=4, optimizer=drops)
    with pytest.raises(SettingsError, match="milestones: 2 epochs must stay below the 2 epochs of the run"):
        with_num_steps(inert, num_steps_per_epoch=2)
    with_num_steps(inert.model_copy(update={"num_steps": 5}), num_steps_per_epoch=2)
