"""What happened in a run, read back from its folder: settings, record and events of all its starts and ranks."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lookalike.errors import ArtifactError
from training.reporting.run_record import read_record

# The last part of a run, whose mean is its final loss: one batch says little.
_FINAL_SHARE = 0.05
_START_OF_LINE = '{"time"'


@dataclass(frozen=True)
class RunHistory:
    """A run; steps that a resumed run repeated count as they went the last time."""

    folder: Path
    settings: Mapping[str, Any]  # resolved
    record: Mapping[str, Any]  # see `run_record`; empty for a run that has none
    steps: Mapping[int, Mapping[str, Any]]  # number from 0 -> its event, ascending
    validations: Mapping[int, Mapping[str, Any]]  # steps done -> its event, ascending
    is_finished: bool

    @property
    def recipe(self) -> str | None:
        """Equal for runs that differ by their seed alone; None where it is not known."""
        return self.record.get("recipe")

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    @property
    def images_per_second(self) -> float | None:
        """Median over steps."""
        return _median(self.column("images_per_second"))

    @property
    def seconds(self) -> float | None:
        """Spent in steps that count, with all that lies between them; not while the run stood still."""
        batch = self.settings.get("batch", {})
        num_images = batch.get("classes_per_batch", 0) * batch.get("images_per_class", 0)
        rates = [rate for rate in self.column("images_per_second").values() if rate > 0]
        return sum(num_images / rate for rate in rates) if rates and num_images else None

    @property
    def loss_name(self) -> str:
        """`loss_above_floor` where the floor of the loss is known, else `loss`."""
        return "loss_above_floor" if self.column("loss_above_floor") else "loss"

    @property
    def final_loss(self) -> float | None:
        """Mean over the last twentieth of the steps."""
        values = list(self.column(self.loss_name).values())
        return statistics.fmean(values[-max(1, round(_FINAL_SHARE * len(values))) :]) if values else None

    @property
    def final_validation(self) -> float | None:
        values = list(self.column("value", of="validations").values())
        return values[-1] if values else None

    @property
    def best_validation(self) -> float | None:
        return max(self.column("value", of="validations").values(), default=None)

    @property
    def best_step(self) -> int | None:
        """Steps done at the best validation; the earlier of equal ones."""
        values = self.column("value", of="validations")
        return max(values, key=lambda step: (values[step], -step), default=None)

    def column(self, name: str, *, of: str = "steps") -> dict[int, float]:
        """A number's course, where events have it."""
        events: Mapping[int, Mapping[str, Any]] = getattr(self, of)
        return {
            step: float(event[name])
            for step, event in events.items()
            if isinstance(event.get(name), int | float) and not isinstance(event[name], bool)
        }


def read_run(run: Path) -> RunHistory:
    """Reads a run that is finished, interrupted or still going on.

    Raises:
        ArtifactError: the folder holds no run, or settings that cannot be read.
    """
    path = run / "settings.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{run} holds no training run: it has no settings.yaml. Give the `run` of a training."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path} holds a {type(settings).__name__}, expected the settings of a run.")
    steps: dict[int, Mapping[str, Any]] = {}
    validations: dict[int, Mapping[str, Any]] = {}
    # Every rank writes the same numbers: others fill in what the first has lost.
    for events in sorted(run.glob("events-rank*.jsonl"), key=_rank_of):
        own_steps, own_validations = _read_events(events)
        steps = {**own_steps, **steps}
        validations = {**own_validations, **validations}
    return RunHistory(
        folder=run,
        settings=settings,
        record=read_record(run),
        steps=dict(sorted(steps.items())),
        validations=dict(sorted(validations.items())),
        is_finished=(run / "encoder").exists(),
    )


def _read_events(path: Path) -> tuple[dict[int, Mapping[str, Any]], dict[int, Mapping[str, Any]]]:
    """Steps and validations of one rank."""
    steps: dict[int, Mapping[str, Any]] = {}
    validations: dict[int, Mapping[str, Any]] = {}
    last = -1
    for event in _events_of(path):
        step = event.get("step")
        if not isinstance(step, int):
            continue
        if event.get("event") == "step":
            if step <= last:
                # A resumed run goes on from here: what came after went otherwise, or will.
                steps = {known: value for known, value in steps.items() if known < step}
                validations = {known: value for known, value in validations.items() if known <= step}
            steps[step] = event
            last = step
        elif event.get("event") == "validation":
            validations[step] = event
    return steps, validations


def _events_of(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, without what a kill has cut off."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                # A resumed run may have gone on in the middle of the line that a kill cut off.
                try:
                    event = json.loads(line[max(0, line.rfind(_START_OF_LINE)) :])
                except ValueError:
                    continue
            if isinstance(event, dict):
                yield event


def _rank_of(path: Path) -> int:
    match = re.fullmatch(r"events-rank(\d+)\.jsonl", path.name)
    return int(match.group(1)) if match else 1 << 30


def _median(values: Mapping[int, float]) -> float | None:
    return statistics.median(values.values()) if values else None
