"""Which batches a run consists of, and how many steps that is."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.shard_set import ShardSet
from lookalike.errors import SettingsError
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
    """Without validation all pictures of the split are trained on."""
    rows = shard_set.rows(settings.split)
    if settings.validation is None:
        return RunRows(rows, rows[:0])
    held_out = settings.validation
    return RunRows(
        *split_classes(shard_set.labels, rows, shard_set.class_names, share=held_out.class_share, seed=held_out.seed)
    )


def plan_batches(settings: TrainSettings, shard_set: ShardSet, world: World) -> ClassBalancedBatches:
    """The batches of all steps.

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
    return ClassBalancedBatches(
        shard_set.labels,
        rows_of_run(settings, shard_set).training,
        classes_per_batch=batch.classes_per_batch,
        images_per_class=batch.images_per_class,
        seed=settings.seed,
    )


def with_num_steps(settings: TrainSettings, *, num_steps_per_epoch: int) -> TrainSettings:
    """The same settings with their length in steps.

    Raises:
        SettingsError: the warm-up does not end within the run.
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
    return settings


def training_classes(settings: TrainSettings, shard_set: ShardSet) -> Int64[Tensor, "classes"]:
    """All labels of the training pictures, ascending."""
    labels = np.unique(shard_set.labels[rows_of_run(settings, shard_set).training])
    return torch.from_numpy(labels[labels >= 0])
