"""Dynamic batching: what many requests ask of one stage at the same time is worked on together.

An idle thread takes what comes at once. A busy one then finds what has gathered meanwhile; it goes on when that fills a
batch, or when the oldest has waited long enough.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from serving.engine.errors import OverloadedError

Job = TypeVar("Job")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """A result, and how long the batch took that it was in."""

    result: Result
    work_seconds: float
    batch_size: int


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Job]):
    job: Job
    key: Hashable
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    expires: float | None
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Job, Result]):
    """Threads that work on batches; may be asked from several event loops. Its queue is bounded by who asks.

    One job's error is its own: `work` returns it in the job's place. Where `work` itself raises, the jobs of that batch
    are worked on one by one.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Job]], Sequence[Result | Exception]],
        *,
        name: str,
        max_size: int,
        max_wait_seconds: float = 0.0,
        key: Callable[[Job], Hashable] = lambda job: None,
        num_threads: int = 1,
        on_batch: Callable[[int], None] = lambda size: None,
        initializer: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            work: Given jobs of one key, returns a result or an error for each.
            max_wait_seconds: How long the thread of a busy stage waits for more; several threads never wait.
            on_batch: Told the size of every batch.
            initializer: Called by each thread before its first batch.
        """
        if max_wait_seconds and num_threads > 1:
            raise ValueError("several threads never wait: one that is idle takes what there is")
        self._work, self._key, self._on_batch, self._initializer = work, key, on_batch, initializer
        self._max_size, self._max_wait_seconds = max_size, max_wait_seconds
        self._waiting: deque[_Waiting[Job]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, job: Job, *, deadline_seconds: float | None = None) -> Done[Result]:
        """Waits for a batch that the job is in.

        Args:
            deadline_seconds: From now; a job that has waited for so long is not begun.

        Raises:
            OverloadedError: the deadline passed before the job was begun.
            Exception: whatever `work` found wrong with this job.
        """
        loop = asyncio.get_running_loop()
        expires = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        waiting = _Waiting(job, self._key(job), loop, loop.create_future(), expires)
        with self._changed:
            if self._is_closed:
                raise OverloadedError("the server is stopping", retry_after_seconds=1.0)
            self._waiting.append(waiting)
            self._changed.notify()
        done: Done[Result] = await waiting.future
        return done

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def seconds_waited(self) -> float:
        """By the oldest job that waits; 0 where none does."""
        try:
            return time.monotonic() - self._waiting[0].since
        except IndexError:
            return 0.0

    def close(self) -> None:
        """Works on what waits, and ends the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        self._initializer()
        while True:
            with self._changed:
                is_idle = not self._waiting
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._changed.wait()
                if not is_idle:
                    self._wait_for_more()
                batch = self._take()
            if batch:
                self._work_on(batch)
            del batch  # or a thread that is idle keeps the version in memory that it last searched

    def _wait_for_more(self) -> None:
        due = self._waiting[0].since + self._max_wait_seconds
        while len(self._waiting) < self._max_size and not self._is_closed:
            left = due - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> list[_Waiting[Job]]:
        """The oldest job and those like it, without those that nobody waits for any more."""
        batch: list[_Waiting[Job]] = []
        rest: deque[_Waiting[Job]] = deque()
        now = time.monotonic()
        for waiting in self._waiting:
            if waiting.future.cancelled():
                continue
            if waiting.expires is not None and now > waiting.expires:
                waited = now - waiting.since
                error = OverloadedError(f"it waited {waited:.2g} s, too long to begin", retry_after_seconds=waited)
                _deliver(waiting.loop, [(waiting, error)])
            elif not batch or (len(batch) < self._max_size and waiting.key == batch[0].key):
                batch.append(waiting)
            else:
                rest.append(waiting)
        self._waiting = rest
        return batch

    def _work_on(self, batch: list[_Waiting[Job]]) -> None:
        try:
            self._on_batch(len(batch))
        except Exception:
            # The thread must live on, or whoever comes later waits without end.
            logger.exception("a batch could not be counted")
        started = time.perf_counter()
        try:
            results: Sequence[Result | Exception] = self._work([waiting.job for waiting in batch])
        except Exception as error:
            results = [error] if len(batch) == 1 else [self._alone(waiting.job) for waiting in batch]
        seconds = time.perf_counter() - started
        outcomes = [
            (waiting, result if isinstance(result, Exception) else Done(result, seconds, len(batch)))
            for waiting, result in zip(batch, results, strict=True)
        ]
        for loop in {waiting.loop for waiting in batch}:
            _deliver(loop, [(waiting, outcome) for waiting, outcome in outcomes if waiting.loop is loop])

    def _alone(self, job: Job) -> Result | Exception:
        try:
            return self._work([job])[0]
        except Exception as error:
            return error


def _deliver(loop: asyncio.AbstractEventLoop, outcomes: list[tuple[_Waiting[Any], Any]]) -> None:
    def deliver() -> None:
        for waiting, outcome in outcomes:
            if waiting.future.done():
                continue  # nobody waits for it any more
            if isinstance(outcome, Exception):
                waiting.future.set_exception(outcome)
            else:
                waiting.future.set_result(outcome)

    if not loop.is_closed():
        loop.call_soon_threadsafe(deliver)
