"""Numbers that change while training: with the steps, or with what the batches say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """A number for every step. What it learns from batches is its state."""

    def at(self, step: int) -> float:
        """The number to use at `step`."""
        ...

    def observe(self, live_fraction: float) -> None:
        """Takes in the share of a step's queries that had a gradient, over all processes."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """From `start` at step 0 evenly to `end` at `num_steps`, where it stays."""

    start: float
    end: float
    num_steps: int

    def at(self, step: int) -> float:
        if step >= self.num_steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.num_steps

    def observe(self, live_fraction: float) -> None:
        """Nothing but the step moves it."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """There is nothing to load."""


def constant(value: float) -> LinearSchedule:
    return LinearSchedule(value, value, 1)


class LiveFractionController:
    """Raises a number while too few queries have a gradient, and lowers it while too many have.

    After each step the number is multiplied by exp(gain * (target - share)), share being an exponential moving
    average, and kept within its bounds. It starts at the upper one. All processes observe the same share, so they all
    hold the same number.
    """

    def __init__(self, *, target: float, lowest: float, highest: float, smoothing: float, gain: float) -> None:
        self._target = target
        self._bounds = (lowest, highest)
        self._smoothing = smoothing
        self._gain = gain
        self._value = highest
        self._share: float | None = None

    def at(self, step: int) -> float:
        return self._value

    def observe(self, live_fraction: float) -> None:
        past = live_fraction if self._share is None else self._share
        self._share = self._smoothing * past + (1 - self._smoothing) * live_fraction
        lowest, highest = self._bounds
        moved = self._value * math.exp(self._gain * (self._target - self._share))
        self._value = min(max(moved, lowest), highest)

    def state_dict(self) -> dict[str, float]:
        state = {"value": self._value}
        return state if self._share is None else {**state, "share": self._share}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._value = state["value"]
        self._share = state.get("share")


@dataclass(frozen=True, slots=True)
class KsSchedule:
    """Depths of recall@k, each of which changes evenly and is rounded."""

    parts: tuple[LinearSchedule, ...]

    def at(self, step: int) -> tuple[int, ...]:
        return tuple(round(part.at(step)) for part in self.parts)


def ks_schedule(start: Sequence[int], end: Sequence[int], num_steps: int) -> KsSchedule:
    return KsSchedule(tuple(LinearSchedule(float(a), float(b), num_steps) for a, b in zip(start, end, strict=True)))
