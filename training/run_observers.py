"""Who looks on while a run is trained: the event log of each process, TensorBoard and a progress line of the first."""

import time
from contextlib import ExitStack
from types import TracebackType

from lookalike.events import EventLog
from lookalike.progress import Progress
from lookalike.world import World
from training.event_board import EventBoard
from training.reporting.progress_note import progress_note
from training.settings import TrainSettings


class RunObservers:
    """Tells all of them of steps and validations; a context manager."""

    def __init__(self, settings: TrainSettings, *, first_step: int, world: World) -> None:
        """
        Raises:
            ResourceError: tensorboard is asked for and not installed.
        """
        self._num_images = settings.batch.num_images
        self._best_validation: float | None = None
        with ExitStack() as stack:
            self._events = stack.enter_context(EventLog(settings.run / f"events-rank{world.rank}.jsonl"))
            self._board: EventBoard | None = None
            if settings.tensorboard and world.is_first:
                self._board = stack.enter_context(EventBoard(settings.run / "tensorboard", first_step=first_step))
            self._progress = stack.enter_context(
                Progress(
                    settings.num_steps, description="training", unit="steps", done=first_step, is_shown=world.is_first
                )
            )
            self._stack = stack.pop_all()
        self._finished = time.perf_counter()

    def step(self, step: int, measured: dict[str, float]) -> None:
        """Takes in what step number `step` measured."""
        # From the end of the step before: waiting for pictures counts.
        started, self._finished = self._finished, time.perf_counter()
        rate = round(self._num_images / (self._finished - started), 2)
        values = {**measured, "images_per_second": rate}
        self._events.write("step", step=step, **values)
        if self._board is not None:
            self._board.write("step", step=step, **values)
        note = progress_note(
            images_per_second=rate,
            loss=measured["loss"],
            loss_above_floor=measured.get("loss_above_floor"),
            hit_rate_at_1=measured["hit_rate_at_1"],
            best_validation=self._best_validation,
        )
        self._progress.advance(note=note)

    def validation(self, step: int, measured: dict[str, float], *, best_step: int | None, best_value: float) -> None:
        """Takes in the validation after `step` steps."""
        values = {**measured, "is_best": step == best_step}
        self._events.write("validation", step=step, **values)
        if self._board is not None:
            # At the last of those steps: a run that is resumed after them leaves out what stands at later ones.
            self._board.write("validation", step=step - 1, **values)
        self._best_validation = best_value

    def __enter__(self) -> "RunObservers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
