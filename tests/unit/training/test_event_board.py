import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lookalike.errors import ResourceError
from lookalike.events import read_events
from lookalike.settings import validate_settings
from lookalike.world import World
from training.event_board import EventBoard
from training.run_observers import RunObservers
from training.settings import TrainSettings


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_numbers_become_curves_and_a_resumed_run_continues_them(tmp_path: Path) -> None:
    with EventBoard(tmp_path, first_step=0) as board:
        for step in range(4):
            board.write("step", step=step, loss=1.0 / (step + 1), note="no number")
    with EventBoard(tmp_path, first_step=2) as board:
        board.write("step", step=2, loss=0.25)
    assert curve(tmp_path, "step/loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_a_validation_that_a_checkpoint_knows_of_stays_in_the_curve(tmp_path: Path) -> None:
    tree = {
        "shards": "shards",
        "run": tmp_path,
        "num_steps": 4,
        "batch": {"classes_per_batch": 4},
        "encoder": {"backbone": "resnet10t"},
        "optimizer": {"lr": 0.1},
        "tensorboard": True,
    }
    settings = validate_settings(TrainSettings, tree, where="test")
    measured = {"loss": 1.0, "hit_rate_at_1": 0.5}
    with RunObservers(settings, first_step=0, world=World()) as observers:
        for step in range(2):
            observers.step(step, measured)
        observers.validation(2, {"value": 0.5}, best_step=2, best_value=0.5)
        observers.step(2, measured)  # lost with the process
    with RunObservers(settings, first_step=2, world=World()) as observers:
        observers.step(2, {**measured, "loss": 0.25})
    assert curve(tmp_path / "tensorboard", "step/loss") == [(0, 1.0), (1, 1.0), (2, 0.25)]
    assert [value for _, value in curve(tmp_path / "tensorboard", "validation/value")] == [0.5]
    assert [event["step"] for event in read_events(tmp_path / "events-rank0.jsonl", "validation")] == [2]


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"lookalike\[tensorboard\]"):
        EventBoard(tmp_path, first_step=0)
