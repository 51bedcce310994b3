"""A request to stop: SIGTERM lets a training loop finish its step, save and leave."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

import torch

from lookalike.collectives import any_rank
from lookalike.world import World

_EXIT_CODE = 128 + signal.SIGTERM
# Whoever stops a job often signals all of its processes, and torchrun passes its own signal on to its workers.
_ECHO_SECONDS = 5.0

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether SIGTERM came; a context manager that answers the signal while it is open.

    The first signal is remembered, nothing is interrupted; those of the next seconds are taken for the same request,
    and a later one does what it would have done before. Outside the main thread, where Python takes no signals, there
    never is a request.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: Tells seconds.
        """
        self.is_made = False
        self._clock = clock
        self._made_at: float | None = None
        self._handler_before: Callable[[int, FrameType | None], object] | int | None = None
        self._is_listening = False

    def agreed(self, world: World, *, device: torch.device) -> bool:
        """Whether any rank was asked; collective, so that all stop after the same step."""
        is_agreed = any_rank(self.is_made, world, device=device)
        if is_agreed and world.is_first:
            logger.info(
                "asked to stop: saving a checkpoint; another SIGTERM after %.0f seconds ends at once", _ECHO_SECONDS
            )
        return is_agreed

    def leave(self) -> NoReturn:
        """Ends the process with the exit code of SIGTERM, cleanly: context managers close."""
        raise SystemExit(_EXIT_CODE)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._note)
            self._is_listening = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_listening()

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._made_at is None:
            self.is_made, self._made_at = True, now
        elif now - self._made_at >= _ECHO_SECONDS:
            self._stop_listening()
            signal.raise_signal(signal.SIGTERM)

    def _stop_listening(self) -> None:
        if self._is_listening:
            # None: the handler before was not set from Python.
            signal.signal(signal.SIGTERM, self._handler_before or signal.SIG_DFL)
            self._is_listening = False
