"""AdamW over parameter groups, and the learning rate of each step."""

import math

import torch
from torch import nn

from lookalike.encoder import Encoder
from training.settings import OptimizerSettings


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


def create_optimizer(encoder: Encoder, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Groups: backbone and projection, each with and without weight decay.

    Raises:
        ValueError: every parameter is frozen.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            # One-dimensional parameters are norms, biases and the power of the pooling.
            key = (name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("frozen: no parameter is left to train")
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if is_decayed else 0.0,
                "highest_lr": settings.lr * (1.0 if is_backbone else settings.projection_lr_multiplier),
            }
            for (is_backbone, is_decayed), parameters in sorted(groups.items())
        ],
        lr=settings.lr,
    )


def schedule_factor(step: int, settings: OptimizerSettings, *, num_steps: int) -> float:
    """Factor on the highest learning rate at `step` in [0, num_steps)."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / (num_steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * factor
