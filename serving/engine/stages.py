"""Clock of one request: how long each stage worked on it, and how long it waited between them."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_STAGES = ("open", "decode", "encode", "search", "rerank", "metadata")


class Stages:
    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._work_ms: dict[str, float] = {}
        self.spans_ns: dict[str, tuple[int, int]] = {}  # stage -> start and end, in nanoseconds of Unix time

    def timed(self, stage: str, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work`, whose time is counted as `stage` where it runs, without its wait for a thread."""

        def timed_work(*arguments: Any) -> Result:
            started = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self.count(stage, time.perf_counter() - started)

        return timed_work

    def count(self, stage: str, seconds: float) -> None:
        """Of pictures that are worked on at the same time, the one that takes longest counts."""
        if 1000 * seconds >= self._work_ms.get(stage, 0.0):
            ended = time.time_ns()
            self._work_ms[stage], self.spans_ns[stage] = 1000 * seconds, (ended - int(1e9 * seconds), ended)

    def timings_ms(self) -> dict[str, float]:
        total = 1000 * (time.perf_counter() - self._started)
        queue = max(0.0, total - sum(self._work_ms.values()))
        work = {stage: self._work_ms[stage] for stage in _STAGES if stage in self._work_ms}
        return {stage: round(ms, 3) for stage, ms in {**work, "queue": queue, "total": total}.items()}
