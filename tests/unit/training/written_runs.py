"""Run folders as training leaves them, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lookalike.events import EventLog

SETTINGS = {"seed": 3, "batch": {"classes_per_batch": 5, "images_per_class": 4}}


def begin_run(run: Path) -> Path:
    run.mkdir()
    (run / "settings.yaml").write_text(f"# Resolved settings of this run\n{yaml.safe_dump(SETTINGS)}")
    return run


def write_steps(run: Path, steps: range, *, loss: float, rank: int = 0) -> None:
    with EventLog(run / f"events-rank{rank}.jsonl") as events:
        for step in steps:
            events.write("step", step=step, loss=loss, images_per_second=10.0)


def write_validation(run: Path, step: int, value: float) -> None:
    with EventLog(run / "events-rank0.jsonl") as events:
        events.write("validation", step=step, value=value)


def make_run(
    run: Path,
    *,
    recipe: str = "r",
    seed: int = 0,
    num_steps: int = 40,
    validations: Sequence[float] = (),
    is_finished: bool = True,
    **settings: Any,
) -> Path:
    """A run of 40 planned steps whose hit rate is its progress, validated every ten steps."""
    run.mkdir()
    tree = {**SETTINGS, "run": str(run), "num_steps": 40, "seed": seed, **settings}
    (run / "settings.yaml").write_text(yaml.safe_dump(tree))
    (run / "run.json").write_text(json.dumps({"identity": f"{recipe} {seed}", "recipe": recipe}))
    if is_finished:
        (run / "encoder").mkdir()
    with EventLog(run / "events-rank0.jsonl") as events:
        for step in range(num_steps):
            measured = {"hit_rate_at_1": step / 40, "recall_at_16": step / 80, "lr": 1e-4, "images_per_second": 10.0}
            events.write("step", step=step, loss=1.0 + seed, loss_above_floor=0.5 + seed, **measured)
            if step % 10 == 9 and step // 10 < len(validations):
                events.write("validation", step=step + 1, value=validations[step // 10])
    return run
