"""Which batches a run consists of, and how many steps that is."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.hard_class_batches import HardClassBatches
from data_pipelines.shard_set import ShardSet
from lookalike.errors import DataError, SettingsError
from lookalike.settings import validate_settings
from lookalike.world import World
from training.optimizer import warmup_length
from training.settings import TrainSettings
from training.validation import split_classes


@dataclass(frozen=True, slots=True)
class RunRows:
    """Rows of the shard set that a run looks at; no class is on both sides."""

    training: Int64[ndarray, "training_rows"]
    validation: Int64[ndarray, "validation_rows"]


def rows_of_run(settings: TrainSettings, shard_set: ShardSet) -> RunRows:
    """Without validation all pictures of the split are trained on.

    Raises:
        DataError: there is no such split.
    """
    if settings.split is not None and settings.split != "all" and shard_set.splits == ["all"]:
        raise DataError(
            f"{settings.shards} has no split {settings.split!r}: its pictures came without splits. Say split=null to "
            "train on all of them."
        )
    rows = shard_set.rows(settings.split)
    if settings.validation is None:
        return RunRows(rows, rows[:0])
    held_out = settings.validation
    return RunRows(
        *split_classes(shard_set.labels, rows, shard_set.class_names, share=held_out.class_share, seed=held_out.seed)
    )


def plan_batches(
    settings: TrainSettings,
    shard_set: ShardSet,
    world: World,
    *,
    near_classes: Int64[ndarray, "all_classes near"] | None = None,
) -> ClassBalancedBatches:
    """The batches of all steps.

    Args:
        near_classes: Of each label, other labels, nearest first: those meet. None lets any classes meet.

    Raises:
        SettingsError: the batch does not divide over the processes.
        DataError: the split has too few classes.
    """
    batch = settings.batch
    if batch.num_images % world.size:
        raise SettingsError(
            f"batch: {batch.num_images} images do not divide over {world.size} processes. "
            "Choose classes_per_batch as a multiple of the number of processes."
        )
    images_per_process = batch.num_images // world.size
    if settings.batch_norm == "trained" and batch.chunk_size != "auto" and images_per_process % batch.chunk_size:
        raise SettingsError(
            f"batch_norm trained normalises each chunk by itself, so {world.size} processes must have the chunks of "
            f"one: batch.chunk_size ({batch.chunk_size}) must divide the {images_per_process} images of a process."
        )
    rows = rows_of_run(settings, shard_set)
    arguments: dict[str, Any] = {
        "labels": shard_set.labels,
        "rows": rows.training,
        "classes_per_batch": batch.classes_per_batch,
        "images_per_class": batch.images_per_class,
        "seed": settings.seed,
    }
    if near_classes is None or batch.hard_classes is None:
        try:
            return ClassBalancedBatches(**arguments)
        except DataError as error:
            if not len(rows.validation):
                raise
            raise DataError(f"{error} Validation holds out {len(rows.validation)} pictures more.") from error
    return HardClassBatches(
        **arguments, near_classes=near_classes, classes_per_group=batch.hard_classes.classes_per_group
    )


def with_num_steps(settings: TrainSettings, *, num_steps_per_epoch: int) -> TrainSettings:
    """The same settings with their length in steps.

    Raises:
        SettingsError: the warm-up does not end within the run, a milestone lies beyond it, or hard classes would never
            meet.
    """
    if settings.num_epochs is not None:
        length = {"num_steps": settings.num_epochs * num_steps_per_epoch, "num_epochs": None}
        settings = validate_settings(TrainSettings, {**settings.model_dump(), **length}, where="num_epochs in steps")
    num_warmup_steps = warmup_length(settings.optimizer, num_steps_per_epoch=num_steps_per_epoch)
    if num_warmup_steps >= settings.num_steps:
        raise SettingsError(
            f"optimizer.warmup_epochs: {num_warmup_steps} steps of warm-up must stay below num_steps "
            f"({settings.num_steps})."
        )
    milestones, num_epochs = settings.optimizer.milestones, math.ceil(settings.num_steps / num_steps_per_epoch)
    if milestones and settings.optimizer.unit == "epoch" and milestones[-1] >= num_epochs:
        raise SettingsError(
            f"optimizer.milestones: {milestones[-1]} epochs must stay below the {num_epochs} epochs of the run "
            f"({settings.num_steps} steps, {num_steps_per_epoch} per epoch), or its drop would never come. Leave it "
            "out, or train longer."
        )
    hard_classes = settings.batch.hard_classes
    if hard_classes is not None and hard_classes.first_epoch * num_steps_per_epoch >= settings.num_steps:
        raise SettingsError(
            f"batch.hard_classes has no effect: the run ends after {settings.num_steps} steps, epoch "
            f"{hard_classes.first_epoch} begins after {hard_classes.first_epoch * num_steps_per_epoch}. Lower "
            "hard_classes.first_epoch, or train longer."
        )
    return settings


def training_classes(settings: TrainSettings, shard_set: ShardSet) -> Int64[Tensor, "classes"]:
    """All labels of the training pictures, ascending."""
    labels = np.unique(shard_set.labels[rows_of_run(settings, shard_set).training])
    return torch.from_numpy(labels[labels >= 0])
