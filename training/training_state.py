"""All that changes from step to step, and how it begins or is resumed."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from lookalike.encoder import Encoder, available_device, create_encoder
from lookalike.errors import SettingsError
from lookalike.world import World
from training.backends.protocol import (
    Backend,
    MakeOptimizer,
    create_backend,
    full_encoder,
    full_encoder_everywhere,
    require_supported,
)
from training.backends.single import Single
from training.checkpoint import Checkpoint
from training.hard_classes import HardClasses
from training.loss_registry import create_loss, loss_learns
from training.losses.batch_loss import BatchLoss
from training.optimizer import create_optimizer, freeze_parameters
from training.passes import Passes, plan_passes
from training.selection import Selection
from training.settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Weights, optimizer, what the loss and the batches remember or learn, and which validation was the best one."""

    encoder: Encoder  # what the back end trains; where that spreads weights, only it can read them
    backend: Backend
    loss: BatchLoss
    passes: Passes
    average: Encoder | None  # exponential moving average of the weights
    selection: Selection
    hard_classes: HardClasses | None  # which classes meet, where embeddings decide it
    step: int = 0

    def result(self, world: World) -> Encoder:
        """The encoder to embed with, on every process; collective. Where weights are spread, a whole copy of them."""
        if self.backend.spreads_weights:
            return full_encoder_everywhere(self.backend, self.encoder, world=world)
        return self.average or self.encoder

    def result_on_first(self, world: World) -> Encoder | None:
        """The encoder to embed with, on the first rank and None elsewhere; collective."""
        if self.average is not None or isinstance(self.backend, Single):
            return self.result(world) if world.is_first else None
        return full_encoder(self.backend, self.encoder, world=world)

    def state_dict(self) -> dict[str, Any]:
        """All but the step and the weights of `result`, which a checkpoint stores as an encoder.

        Collective; complete on the first rank.
        """
        return {
            "optimizer": self.backend.optimizer_state(),
            "loss": self.loss.state_dict(),
            "averaged_encoder": self.backend.full_weights() if self.average else None,
            "selection": self.selection.state_dict(),
            "hard_classes": self.hard_classes.state_dict() if self.hard_classes else None,
            "chunk_size": self.passes.chunk_size,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; collective."""
        self.step = checkpoint.step
        weights = checkpoint.weights
        if self.average is not None:
            self.average.load_state_dict(weights)
            weights = checkpoint.state["averaged_encoder"]
        self.backend.load(weights, checkpoint.state["optimizer"])
        self.loss.load_state_dict(checkpoint.state["loss"])
        self.selection.load_state_dict(checkpoint.state["selection"])
        if self.hard_classes is not None:
            self.hard_classes.load_state_dict(checkpoint.state["hard_classes"])


def begin_or_resume(
    settings: TrainSettings,
    checkpoint: Checkpoint | None,
    *,
    classes: Int64[Tensor, "classes"],
    world: World = World(),
) -> TrainingState:
    """The state of step 0, or that of a checkpoint; collective.

    Args:
        classes: All labels of the training pictures, ascending.

    Raises:
        SettingsError: the network or its parts do not exist or do not fit, or the back end cannot go on from there.
        ResourceError: weights or a library are missing, or memory does not hold a chunk.
    """
    encoder = new_encoder(settings)
    loss = create_loss(settings.loss, dim=encoder.dim, classes=classes, seed=settings.seed).to(available_device())
    average = copy.deepcopy(encoder).requires_grad_(False) if settings.average_decay is not None else None
    stored_chunk_size = None if checkpoint is None else checkpoint.state["chunk_size"]
    passes = plan_passes(settings, encoder, stored_chunk_size=stored_chunk_size, world=world)
    if settings.compute.compiles_backbone:
        encoder.backbone.compile()
    backend = create_backend(
        settings.backend,
        encoder,
        optimizer_maker(settings, loss),
        max_gradient_norm=settings.optimizer.max_gradient_norm,
        world=world,
    )
    selection = Selection(patience=settings.validation.patience if settings.validation else None)
    mining = settings.batch.hard_classes
    hard_classes = HardClasses(classes, dim=encoder.dim, settings=mining) if mining is not None else None
    state = TrainingState(encoder, backend, loss, passes, average, selection, hard_classes)
    if checkpoint is not None:
        state.load(checkpoint)
        logger.info("resuming %s after step %d", settings.run, state.step)
    return state


def require_supported_settings(settings: TrainSettings, world: World) -> None:
    """Raises SettingsError for what the back end cannot do, before anything slow."""
    require_supported(
        settings.backend,
        world=world,
        loss_learns=loss_learns(settings.loss),
        keeps_average=settings.average_decay is not None,
        compiles_backbone=settings.compute.compiles_backbone,
    )


def new_encoder(settings: TrainSettings) -> Encoder:
    """The encoder of step 0 on its device, with frozen parameters marked; seeds torch's global generator.

    Raises:
        SettingsError: the network or its parts do not exist or do not fit.
        ResourceError: weights are missing.
    """
    torch.manual_seed(settings.seed)  # the first weights of the projection, then of what the loss learns
    encoder = create_encoder(settings.encoder, settings.weights).to(available_device())
    try:
        freeze_parameters(encoder, settings.frozen)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if settings.compute.recomputes_activations:
        _recompute_activations(encoder)
    return encoder


def optimizer_maker(settings: TrainSettings, loss: BatchLoss | None) -> MakeOptimizer:
    """From an encoder, whose parameters a back end may have replaced, to its optimizer, and that of the loss."""

    def make_optimizer(encoder: Encoder) -> torch.optim.Optimizer:
        try:
            return create_optimizer(
                encoder,
                settings.optimizer,
                loss_parameters=list(loss.parameters()) if loss else None,
                loss_lr_multiplier=loss.lr_multiplier if loss else 1.0,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error

    return make_optimizer


@torch.no_grad()
def update_average(average: Encoder, encoder: Encoder, *, decay: float, step: int) -> None:
    """Moves the averaged weights towards those after `step`."""
    # Early on the average would mostly be the untrained start: a young average forgets faster.
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), encoder.state_dict().values(), strict=True):
        if mean.is_floating_point():
            # A back end may have given a number a dimension.
            mean.lerp_(value.view_as(mean), 1 - decay)
        else:
            mean.copy_(value)


def _recompute_activations(encoder: Encoder) -> None:
    """Turns on gradient checkpointing in the backbone.

    Raises:
        SettingsError: the backbone has none.
    """
    try:
        encoder.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        raise SettingsError(
            f"compute.recomputes_activations: backbone {encoder.settings.backbone} does not offer it ({error}). "
            "Set it to false and lower batch.chunk_size instead."
        ) from error
