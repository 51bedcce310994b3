"""Small runs on the drawn pictures: their settings, ways to interrupt them, and what they leave."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from lookalike.settings import validate_settings
from training.loop import take_step
from training.settings import TrainSettings

CLASSES = torch.arange(6)


def settings_for(shards: Path | str, run: Path, **changes: object) -> TrainSettings:
    tree: dict[str, object] = {
        "shards": str(shards),
        "run": run,
        "num_steps": 3,
        "batch": {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 3},
        "encoder": {"backbone": "resnet10t", "projection_dim": 8, "input": {"size": 32}},
        "optimizer": {"lr": 1e-3},
        "num_workers": 0,
    }
    return validate_settings(TrainSettings, {**tree, **changes}, where="test")


def settings_file(folder: Path, shards: Path | str, **changes: object) -> Path:
    """What a command is given."""
    tree = {
        "shards": str(shards),
        "run": str(folder / "run"),
        "num_steps": 2,
        "batch": {"classes_per_batch": 2},
        "encoder": {"backbone": "resnet10t"},
        "optimizer": {"lr": 0.1},
    }
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump({**tree, **changes}))
    return file


# Two of the six classes are held out, by their names.
VALIDATION = {"class_share": 0.35, "steps_between": 1}


def stop_at(step_to_stop: int, stop: Callable[[], None]) -> Callable[..., dict[str, float]]:
    """`take_step` that calls `stop` in the given step, after its work is done."""

    def take_step_and_stop(*arguments: Any, step: int, **options: Any) -> dict[str, float]:
        measured = take_step(*arguments, step=step, **options)
        if step == step_to_stop:
            stop()
        return measured

    return take_step_and_stop


def interrupt() -> None:
    raise KeyboardInterrupt


def last_weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step_{step:06d}" / "encoder" / "encoder.safetensors").read_bytes()
