"""What nobody reports by itself, and is looked at while the server runs: queues, index, event loop, recall."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from indexing.searching.searcher import Searcher
from serving.observability.metrics import QueueState, ServingMetrics
from serving.observability.recall_canary import canary_recall

# A measurement of recall takes at most this share of the time: exact search over a large gallery reads all of it.
_LARGEST_SHARE = 0.01

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine serves at one moment."""

    searcher: Searcher  # that of this moment: no later change is seen through it
    index_version: str
    encoder_fingerprint: str | None
    canary_ids: Sequence[int]
    expected_recall: float  # measured by the build, at the default effort and `measured_depth`
    measured_depth: int
    num_changes: int = 0  # in the journal, not yet compacted
    queues: Mapping[str, QueueState] = field(default_factory=dict)


@asynccontextmanager
async def watched(
    state: Callable[[], EngineState],
    metrics: ServingMetrics,
    *,
    canary_seconds: float | None,
    period_seconds: float = 1.0,
) -> AsyncIterator[None]:
    """Watches while the block runs.

    Args:
        state: Called once in each period, off the event loop, by several threads.
        canary_seconds: Time between two measurements of recall; None: none are made.
    """
    task, stopped = asyncio.create_task(_watch_state(state, metrics, period_seconds)), threading.Event()
    if canary_seconds is not None:
        # A daemon, which nothing waits for: an exact search over a large gallery may outlast the time to stop in.
        arguments = (state, metrics, canary_seconds, stopped)
        threading.Thread(target=_watch_recall, args=arguments, name="recall canary", daemon=True).start()
    try:
        yield
    finally:
        stopped.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch_state(state: Callable[[], EngineState], metrics: ServingMetrics, period_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            _tell(await asyncio.to_thread(state), metrics)
        except Exception:
            logger.exception("the state of the server could not be looked at")
        due = loop.time() + period_seconds
        await asyncio.sleep(period_seconds)
        metrics.observe_loop_lag(max(0.0, loop.time() - due))


def _watch_recall(
    state: Callable[[], EngineState], metrics: ServingMetrics, period_seconds: float, stopped: threading.Event
) -> None:
    is_over = False
    while not is_over:
        started = time.perf_counter()
        try:
            _measure_recall(state(), metrics)
        except Exception:
            if stopped.is_set():
                return  # what it looked at was being closed
            # Counted, and an alert: the server goes on answering whatever happens here.
            metrics.count_canary_failure()
            logger.exception("the recall canary could not be measured")
        taken = time.perf_counter() - started
        is_over = stopped.wait(max(period_seconds, taken / _LARGEST_SHARE))


def _tell(state: EngineState, metrics: ServingMetrics) -> None:
    metrics.set_index_version(state.index_version, encoder_fingerprint=state.encoder_fingerprint)
    metrics.set_index_size(num_vectors=state.searcher.num_vectors, num_changes=state.num_changes)
    metrics.set_expected_recall(state.expected_recall, k=state.measured_depth)
    for name, queue in state.queues.items():
        metrics.set_queue(name, queue)


def _measure_recall(state: EngineState, metrics: ServingMetrics) -> None:
    recall = canary_recall(state.searcher, state.canary_ids, k=state.measured_depth)
    if recall is not None:
        metrics.set_canary_recall(recall, k=state.measured_depth, time_seconds=time.time())
