"""The training loop: it reads like the paper's algorithm, and each line of it is a call one can open."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.loader import Batch, training_batches
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import TrainingTransform
from lookalike.collectives import barrier
from lookalike.encoder import Encoder, available_device, save_encoder
from lookalike.errors import NonFiniteLoss
from lookalike.world import World
from training.batch_norm import BatchNormStatistics
from training.checkpoint import CheckpointWriter, best_checkpoint, load_newest_checkpoint
from training.distributed_loss import ScoredBatch, score_across_ranks
from training.gradient_health import measure_batch
from training.large_batch import backward_large_batch, chunk_device, num_chunks
from training.optimizer import schedule_factor, set_learning_rate
from training.reporting.run_record import record_start
from training.run_folder import (
    describe_run,
    difference_to_run,
    require_same_run,
    require_same_start,
    run_identity,
)
from training.run_length import plan_batches, rows_of_run, training_classes, with_num_steps
from training.run_observers import RunObservers
from training.settings import TrainSettings
from training.stop_request import StopRequest
from training.training_state import TrainingState, begin_or_resume, require_supported_settings, update_average
from training.validation import Validator

logger = logging.getLogger(__name__)


def train(settings: TrainSettings, *, world: World = World(), command: str = "") -> Path:
    """Trains as long as the settings say, resuming what the run folder holds; returns the finished encoder's folder.

    With validation the finished encoder is that of the best checkpoint.

    Args:
        command: What started it, for the run's record.

    Raises:
        NonFiniteLoss: on every rank, before weights move.
        ArtifactError: the run folder belongs to another run.
        DataError, SettingsError: the shards do not allow the batches asked for, or settings contradict each other.
        ResourceError: an optional library is missing, or memory does not hold a chunk.
        SystemExit: SIGTERM came; a checkpoint holds all steps that were done.
    """
    require_supported_settings(settings, world)
    with ShardSet.open(settings.shards, cache=settings.shard_cache) as shard_set:
        plan = plan_batches(settings, shard_set, world)
        settings = with_num_steps(settings, num_steps_per_epoch=plan.num_steps_per_epoch)
        identity = run_identity(settings, shard_set)
        encoder_folder = settings.run / "encoder"
        is_finished = encoder_folder.exists()
        checkpoint = None
        if not is_finished:
            difference = partial(difference_to_run, settings.run, settings)
            checkpoint = load_newest_checkpoint(settings.run, identity=identity, difference=difference)
        first_step = 0 if checkpoint is None else checkpoint.step
        require_same_start(settings.run, None if is_finished else first_step, world)
        if is_finished:
            require_same_run(settings.run, identity, settings)
            logger.info("%s is trained already", encoder_folder)
            return encoder_folder
        validator = create_validator(settings, shard_set, world)
        state = begin_or_resume(settings, checkpoint, classes=training_classes(settings, shard_set), world=world)
        if world.is_first:
            describe_run(settings, identity, batch=state.passes.resolve(settings.batch))
            record_start(
                settings.run,
                shard_set,
                identity=identity,
                recipe=run_identity(settings.model_copy(update={"seed": 0}), shard_set),
                step=state.step,
                world=world,
                device=available_device(),
                command=command,
            )
        run_steps(state, settings, shard_set, plan, validator, identity=identity, world=world)
    encoder = finished_encoder(state, settings, world)
    if encoder is not None:
        save_encoder(encoder, encoder_folder)
    barrier(world)
    return encoder_folder


def run_steps(
    state: TrainingState,
    settings: TrainSettings,
    shard_set: ShardSet,
    plan: ClassBalancedBatches,
    validator: Validator | None,
    *,
    identity: str,
    world: World,
) -> None:
    """Runs the steps from `state.step` to `num_steps`, or until validation finds nothing better any more."""
    if state.selection.is_over:
        return
    batches = batches_of_run(state, settings, shard_set, plan, world)
    with (
        RunObservers(settings, first_step=state.step, world=world) as observers,
        checkpoint_writer(settings, identity, world) as writer,
        StopRequest() as stop,
    ):
        for batch in batches:
            factor = schedule_factor(
                batch.step,
                settings.optimizer,
                num_steps=settings.num_steps,
                num_steps_per_epoch=plan.num_steps_per_epoch,
            )
            set_learning_rate(state.backend.optimizer, factor)
            measured = take_step(state, batch.pixels, batch.labels, settings, step=batch.step, world=world)
            observers.step(batch.step, measured)

            value = None
            if validator is not None and validator.is_due(state.step, num_steps=settings.num_steps):
                value = validate(state, validator, observers, world=world)
            is_best = value is not None and state.selection.best_step == state.step
            is_last = state.step == settings.num_steps or state.selection.is_over
            is_stopping = stop.agreed(world, device=available_device())
            if is_best or is_last or is_stopping or state.step % settings.steps_per_checkpoint == 0:
                save_state(state, writer, validation=value, world=world)
            if writer is not None:
                writer.raise_failure()
            if is_stopping:
                stop.leave()
            if is_last:
                break


def batches_of_run(
    state: TrainingState, settings: TrainSettings, shard_set: ShardSet, plan: ClassBalancedBatches, world: World
) -> Iterator[Batch]:
    """This rank's batch of each step that is left.

    Where embeddings decide which classes meet, plans are made while training goes on, which is collective.
    """
    hard_classes, num_steps = state.hard_classes, settings.num_steps
    refreshes = range(0)
    if hard_classes is not None:
        refreshes = hard_classes.refresh_steps(num_steps=num_steps, num_steps_per_epoch=plan.num_steps_per_epoch)
    starts = [state.step, *(step for step in refreshes if step > state.step)]
    for start, stop in zip(starts, [*starts[1:], num_steps], strict=True):
        if hard_classes is not None:
            if start in refreshes:
                hard_classes.refresh(device=available_device(), world=world)
            plan = plan_batches(settings, shard_set, world, near_classes=hard_classes.near_classes)
        yield from training_batches(
            shard_set,
            plan,
            TrainingTransform(settings.augmentation, settings.encoder.input.size),
            world=world,
            seed=settings.seed,
            steps=range(start, stop),
            num_workers=settings.num_workers,
        )


def take_step(
    state: TrainingState,
    pixels: UInt8[Tensor, "batch 3 size size"],
    labels: Int64[Tensor, "batch"],
    settings: TrainSettings,
    *,
    step: int,
    world: World,
) -> dict[str, float]:
    """One optimizer step on the global batch; returns what was measured."""
    encoder, backend, passes = state.encoder.train(), state.backend, state.passes
    labels = labels.to(chunk_device(encoder))
    norms = BatchNormStatistics(encoder, are_trained=settings.batch_norm == "trained")
    scored: ScoredBatch | None = None

    def score(own_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal scored
        scored = score_across_ranks(own_embeddings, labels, state.loss, step=step, world=world)
        return scored.loss, scored.gradient

    norms.begin_step()
    backend.begin_step(num_chunks=num_chunks(len(pixels), passes.chunk_size), num_kept_chunks=passes.num_kept_chunks)
    loss, _ = backward_large_batch(
        backend.network,
        pixels,
        score,
        chunk_size=passes.chunk_size,
        num_kept_chunks=passes.num_kept_chunks,
        seed=(settings.seed * settings.num_steps + step) * world.size + world.rank,
        autocast=passes.autocast,
        is_compiled=passes.is_compiled,
        backward_chunk=backend.backward_chunk,
    )
    assert scored is not None  # backward_large_batch calls score once

    # The loss is that of all ranks, and so is the norm: either stops all of them.
    require_finite(step, loss=loss)
    lr = backend.optimizer.param_groups[0]["lr"]
    measured = measure_batch(scored, state.loss, step=step, world=world)
    gradient_norm = backend.step()
    require_finite(step, loss=loss, gradient_norm=gradient_norm)
    norms.end_step(world)
    if state.average is not None and settings.average_decay is not None:
        update_average(state.average, encoder, decay=settings.average_decay, step=step)
    state.loss.observe(measured)
    if state.hard_classes is not None:
        state.hard_classes.observe(scored.embeddings, scored.labels)
    state.step = step + 1
    return {**measured, "gradient_norm": gradient_norm.item(), "lr": lr}


def require_finite(step: int, **numbers: Tensor) -> None:
    """Raises NonFiniteLoss unless all of a step's numbers are finite."""
    if not all(bool(torch.isfinite(number)) for number in numbers.values()):
        found = ", ".join(f"{name.replace('_', ' ')} {number.item()}" for name, number in numbers.items())
        raise NonFiniteLoss(
            f"step {step}: {found}; the weights are those of the step before. Lower optimizer.lr, set "
            "optimizer.max_gradient_norm, or look for broken pictures."
        )


def create_validator(settings: TrainSettings, shard_set: ShardSet, world: World) -> Validator | None:
    """Raises SettingsError where nothing that is held out can be found."""
    if settings.validation is None:
        return None
    rows = rows_of_run(settings, shard_set).validation
    return Validator(shard_set, rows, settings.validation, world=world, num_threads=max(1, settings.num_workers))


def validate(state: TrainingState, validator: Validator, observers: RunObservers, *, world: World) -> float:
    """What checkpoints are chosen by, of the encoder that would be embedded with; collective."""
    measured = validator.validate(state.result(world))
    selection = state.selection
    selection.observe(state.step, measured["value"])
    observers.validation(state.step, measured, best_step=selection.best_step, best_value=selection.best_value)
    return measured["value"]


def checkpoint_writer(
    settings: TrainSettings, identity: str, world: World
) -> AbstractContextManager[CheckpointWriter | None]:
    """On the first rank the one that writes."""
    if not world.is_first:
        return nullcontext()
    return CheckpointWriter(
        settings.run,
        identity=identity,
        num_kept=settings.num_kept_checkpoints,
        in_background=settings.writes_checkpoints_in_background,
    )


def save_state(
    state: TrainingState, writer: CheckpointWriter | None, *, validation: float | None, world: World
) -> None:
    """Collective; the first rank writes."""
    encoder, rest = state.result_on_first(world), state.state_dict()
    if writer is not None and encoder is not None:
        writer.save(encoder, rest, step=state.step, validation=validation)


def finished_encoder(state: TrainingState, settings: TrainSettings, world: World) -> Encoder | None:
    """On the first rank the best encoder by validation, or else that of the last step; None elsewhere; collective."""
    last = state.result_on_first(world)
    if settings.validation is None or not world.is_first:
        return last
    best = best_checkpoint(settings.run)
    if best is None:
        logger.warning("no validated checkpoint is left in %s: the encoder is that of the last step", settings.run)
        return last
    logger.info("the encoder is that after step %d, validation %.4f", best.step, best.value)
    return best.load_encoder()
