from pathlib import Path
from typing import Any

import pytest

from lookalike.errors import SettingsError
from lookalike.settings import apply_overrides, dump_settings, validate_settings
from training.backend_settings import SingleBackend
from training.loss_settings import ContrastiveLoss, MixingSettings, RecallAtKLoss
from training.optimizer_settings import AdamWSettings, SGDSettings
from training.settings import TrainSettings

TREE: dict[str, Any] = {
    "shards": "shards",
    "run": Path("run"),
    "num_steps": 10,
    "batch": {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 4},
    "encoder": {"backbone": "resnet10t", "input": {"size": 32}},
    "optimizer": {"lr": 1e-3},
}


def settings_with(*overrides: str) -> TrainSettings:
    return validate_settings(TrainSettings, apply_overrides(TREE, overrides), where="test")


def test_loss_and_optimizer_are_chosen_by_name_and_have_defaults() -> None:
    settings = settings_with()
    assert settings.loss == RecallAtKLoss()
    assert settings.optimizer == AdamWSettings(lr=1e-3)
    assert settings_with("loss.ks=[1]").loss == RecallAtKLoss(ks=(1,))
    assert settings_with("loss.name=contrastive", "loss.memory_size=64").loss == ContrastiveLoss(memory_size=64)
    assert settings_with("optimizer.name=sgd", "optimizer.momentum=0.8").optimizer == SGDSettings(lr=1e-3, momentum=0.8)


def test_what_leaves_results_alone_is_off_unless_asked_for() -> None:
    """Files written before these settings existed mean what they meant."""
    settings = settings_with("loss.mixes_similarities=true")
    assert (settings.batch.chunk_size, settings.batch.num_kept_chunks) == (4, 0)
    assert (settings.backend, settings.validation) == (SingleBackend(), None)
    assert settings.loss == RecallAtKLoss(mixes_similarities=True, mixing=MixingSettings(share=1.0, beta=(1.0, 1.0)))


def test_what_is_written_into_the_run_folder_reads_back_the_same() -> None:
    settings = settings_with("loss.rank_temperature={schedule: linear, start: 0.1, end: 0.01, num_steps: 5}")
    assert validate_settings(TrainSettings, dump_settings(settings), where="test") == settings


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["num_epochs=2"], "num_steps or num_epochs"),
        (["num_steps=0"], "num_steps or num_epochs"),
        (["num_steps=0", "num_epochs=2", "optimizer.warmup_epochs=2"], "warmup_epochs must stay below"),
        (["optimizer.warmup_steps=10"], "warmup_steps must stay below"),
        (["optimizer.warmup_steps=1", "optimizer.warmup_epochs=1"], "not both"),
        (["optimizer.schedule=step"], "needs decay_every"),
        (
            ["optimizer.schedule=step", "optimizer.milestones=[3, 10]"],
            r"milestones: 10 must stay below num_steps \(10\)",
        ),
        (
            [
                *("num_steps=0", "num_epochs=7", "optimizer.schedule=step"),
                *("optimizer.unit=epoch", "optimizer.milestones=[3, 9]"),
            ],
            r"milestones: 9 must stay below num_epochs \(7\)",
        ),
        (["optimizer.decay_every=3"], "no effect with schedule cosine"),
        (["optimizer.decay_factor=0.5"], "no effect with schedule cosine"),
        (["optimizer.momentum=0.9"], "no such setting"),
        (["optimizer.name=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"], "nesterov has no effect"),
        (["optimizer.name=lamb"], "adamw"),
        (["loss.name=contrastive", "loss.ks=[1]"], "no such setting"),
        (["loss.name=contrastive", "loss.memory_size=7"], "must hold a batch of 8 images"),
        (["loss.name=contrastive", "loss.memory_start_step=7"], "no effect without memory_size"),
        (["loss.name=margin", "loss.boundary_lr_multiplier=7"], "no effect without learns_boundary"),
        (["loss.name=triplett"], "triplet"),
        (["batch_norm=trained", "batch.chunk_size=3"], "must divide the batch"),
        (["batch_norm=trained", "compute.compiles_backbone=true"], "cannot be combined"),
        (["batch.chunk_size=auto"], "needs num_kept_chunks auto"),
        (["batch.memory_budget=1000000"], "no effect without num_kept_chunks auto"),
        (["batch_norm=trained", "batch.chunk_size=auto", "batch.num_kept_chunks=auto"], "give a number, not auto"),
        (["loss.mixing.share=0.5"], "no effect without mixes_similarities"),
        (["loss.mixes_similarities=true", "loss.mixing.share=0"], "greater than 0"),
        (["loss.ks={schedule: linear, start: [1, 2], end: [1], num_steps: 3}"], "same length"),
        (["loss.ks={schedule: cosine, start: [1], end: [2], num_steps: 3}"], "a list, or a mapping with schedule"),
        (["loss.k_temperature={schedule: cosine, start: 1, end: 2, num_steps: 3}"], "schedule linear or live_fraction"),
        (["loss.k_temperature={start: 1, end: 2, num_steps: 3}"], "schedule linear or live_fraction"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        settings_with(*overrides)
