"""What a run would do: its batches, its length, and the course of everything that changes."""

from typing import Any

from training.loss_registry import ks_of, schedule_of
from training.loss_settings import LinearChange, LiveFractionTarget, RecallAtKLoss, SmoothAPLoss
from training.optimizer import schedule_factor
from training.settings import TrainSettings

_NUM_MOMENTS = 5


def plan_of_run(settings: TrainSettings, *, num_steps_per_epoch: int) -> dict[str, Any]:
    """Plain values, for printing; `settings` with their length in steps."""
    return {
        "images_per_step": settings.batch.num_images,
        "steps": settings.num_steps,
        "epochs": round(settings.num_steps / num_steps_per_epoch, 2),
        "steps_per_epoch": num_steps_per_epoch,
        "loss": settings.loss.name,
        "schedules": [
            {"step": step, **_numbers_at(settings, step, num_steps_per_epoch=num_steps_per_epoch)}
            for step in _moments(settings.num_steps)
        ],
    }


def _moments(num_steps: int) -> list[int]:
    """A few steps from the first to the last."""
    return sorted({round(part * (num_steps - 1) / (_NUM_MOMENTS - 1)) for part in range(_NUM_MOMENTS)})


def _numbers_at(settings: TrainSettings, step: int, *, num_steps_per_epoch: int) -> dict[str, Any]:
    optimizer = settings.optimizer
    factor = schedule_factor(step, optimizer, num_steps=settings.num_steps, num_steps_per_epoch=num_steps_per_epoch)
    numbers: dict[str, Any] = {"lr": _shortened(optimizer.lr * factor)}
    if isinstance(settings.loss, RecallAtKLoss | SmoothAPLoss):
        numbers["rank_temperature"] = _number_at(settings.loss.rank_temperature, step)
    if isinstance(settings.loss, RecallAtKLoss):
        numbers["k_temperature"] = _number_at(settings.loss.k_temperature, step)
        numbers["ks"] = list(ks_of(settings.loss.ks).at(step))
    return numbers


def _number_at(settings: float | LinearChange | LiveFractionTarget, step: int) -> float | str:
    if isinstance(settings, LiveFractionTarget):
        return f"{settings.lowest} to {settings.highest}, by a live fraction of {settings.target}"
    return _shortened(schedule_of(settings).at(step))


def _shortened(number: float) -> float:
    return float(f"{number:.3g}")
