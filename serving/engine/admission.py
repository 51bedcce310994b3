"""Who is let in: as many as can be answered in time, by the rate at which others have been."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.engine.errors import OverloadedError

# Older completions fade: after some 35, half of the rate is told by newer ones.
_FADING = 0.98
_LEAST_RETRY_SECONDS = 0.05


class Admission:
    """Counts what is inside. Safe to use from many threads; costs a microsecond."""

    def __init__(
        self, what: str, *, most_inside: int, most_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            what: Plural, for messages.
            most_seconds: Nobody is let in who could be expected to stay longer.
        """
        self._what, self._most_inside, self._most_seconds, self._clock = what, most_inside, most_seconds, clock
        self._lock = threading.Lock()
        self._num_inside = 0
        self._num_done = self._seconds_busy = 0.0
        self._counted_until = 0.0

    @property
    def num_inside(self) -> int:
        return self._num_inside

    @property
    def seconds_each(self) -> float:
        """Measured while busy; 0 before anything was."""
        return self._seconds_busy / self._num_done if self._num_done else 0.0

    @contextmanager
    def entering(
        self, count: int = 1, *, deadline_seconds: float | None = None, may_be_refused: bool = True
    ) -> Iterator[None]:
        """
        Args:
            count: Of what comes in together and leaves together.
            deadline_seconds: From now; None: the bound that holds for everybody.
            may_be_refused: False where too much was done for it already: it counts, and others are refused.

        Raises:
            OverloadedError: there is no room, or it would take too long.
        """
        with self._lock:
            if may_be_refused:
                self._require_room(count, deadline_seconds)
            if not self._num_inside:
                self._counted_until = self._clock()
            self._num_inside += count
        is_done = False
        try:
            yield
            is_done = True
        finally:
            with self._lock:
                self._num_inside -= count
                if is_done:
                    self._count(count)

    def _require_room(self, count: int, deadline_seconds: float | None) -> None:
        drained_seconds = max(_LEAST_RETRY_SECONDS, self._num_inside * self.seconds_each)
        # An empty room lets anybody in, or who asks for more than fits would never be answered.
        if self._num_inside and self._num_inside + count > self._most_inside:
            raise OverloadedError(
                f"{self._num_inside} {self._what} are being worked on, at most {self._most_inside} may be",
                retry_after_seconds=drained_seconds,
            )
        allowed = self._most_seconds if deadline_seconds is None else min(deadline_seconds, self._most_seconds)
        expected = (self._num_inside + count) * self.seconds_each
        if self._num_inside and expected > allowed:
            raise OverloadedError(
                f"it would take {expected:.2g} s, with {self._num_inside} {self._what} before it, and {allowed:.2g} s "
                "are allowed",
                retry_after_seconds=max(_LEAST_RETRY_SECONDS, expected - allowed),
            )

    def _count(self, count: int) -> None:
        now = self._clock()
        fading = _FADING**count
        self._num_done = self._num_done * fading + count
        self._seconds_busy = self._seconds_busy * fading + (now - self._counted_until)
        self._counted_until = now
