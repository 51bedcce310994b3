import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lookalike.errors import ResourceError
from training.event_board import EventBoard


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


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"lookalike\[tensorboard\]"):
        EventBoard(tmp_path, first_step=0)
