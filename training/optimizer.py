"""Optimizers over parameter groups, and the learning rate of each step."""

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from lookalike.encoder import Encoder
from training.optimizer_settings import (
    AdamSettings,
    AdamWSettings,
    LearningRateSettings,
    OptimizerSettings,
    SGDSettings,
)


def freeze_parameters(encoder: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Takes parameters whose names start with a prefix out of training.

    Raises:
        ValueError: a prefix matches no parameter.
    """
    names = [name for name, _ in encoder.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"frozen: no parameter name starts with {prefix!r}; names look like {names[0]!r}")
    for name, parameter in encoder.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


def create_optimizer(
    encoder: Encoder,
    settings: OptimizerSettings,
    *,
    loss_parameters: list[nn.Parameter] | None = None,
    loss_lr_multiplier: float = 1.0,
) -> torch.optim.Optimizer:
    """Groups: backbone, pooling, projection and what the loss learns, each with and without weight decay.

    Raises:
        ValueError: every parameter of the encoder is frozen.
    """
    multipliers = _lr_multipliers(settings, loss=loss_lr_multiplier)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            # One-dimensional parameters are norms, biases and the power of the pooling.
            is_decayed = parameter.ndim > 1 or settings.decays_every_parameter
            groups.setdefault((name.partition(".")[0], is_decayed), []).append(parameter)
    if not groups:
        raise ValueError("frozen: no parameter is left to train")
    if loss_parameters:
        # Proxies are compared at unit length: decay would only change their learning rate.
        groups["loss", settings.decays_every_parameter] = loss_parameters
    return _create(
        [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if is_decayed else 0.0,
                "highest_lr": settings.lr * multipliers[part],
            }
            for (part, is_decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        settings,
    )


def schedule_factor(step: int, settings: LearningRateSettings, *, num_steps: int, num_steps_per_epoch: int) -> float:
    """Factor on the highest learning rate at `step` in [0, num_steps)."""
    num_warmup_steps = warmup_length(settings, num_steps_per_epoch=num_steps_per_epoch)
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    match settings.unit:
        case "step":
            now, start, end = step, num_warmup_steps, num_steps
        case "epoch":
            # The epoch in which the warm-up ends is at the full rate.
            now, start = step // num_steps_per_epoch, num_warmup_steps // num_steps_per_epoch
            end = math.ceil(num_steps / num_steps_per_epoch)
    match settings.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * (now - start) / (end - start)))
        case "step":
            return float(settings.decay_factor ** _num_drops(settings, now, start=start))


def _num_drops(settings: LearningRateSettings, now: int, *, start: int) -> int:
    """Drops of schedule `step` so far.

    Args:
        now: Steps or epochs done.
        start: Those of the warm-up among them.
    """
    if settings.milestones is not None:
        return bisect_right(settings.milestones, now)
    assert settings.decay_every is not None  # the settings ensure it
    return (now - start) // settings.decay_every


def warmup_length(settings: LearningRateSettings, *, num_steps_per_epoch: int) -> int:
    """Steps of the warm-up."""
    return settings.warmup_steps or settings.warmup_epochs * num_steps_per_epoch


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * factor


def _lr_multipliers(settings: LearningRateSettings, *, loss: float) -> dict[str, float]:
    """By the encoder's part, or the loss."""
    projection = settings.projection_lr_multiplier
    pooling = projection if settings.pooling_lr_multiplier is None else settings.pooling_lr_multiplier
    return {"backbone": 1.0, "pool": pooling, "projection": projection, "loss": loss}


def _create(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    match settings:
        case AdamWSettings() | AdamSettings():
            kind = torch.optim.AdamW if isinstance(settings, AdamWSettings) else torch.optim.Adam
            return kind(
                groups,
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.epsilon,
                amsgrad=settings.keeps_largest_square,
            )
        case SGDSettings():
            return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
