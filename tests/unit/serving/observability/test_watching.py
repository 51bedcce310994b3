import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.living.live_index import LiveIndex
from lookalike.records import SearchHits, SearchParameters
from serving.observability.metrics import QueueState, ServingMetrics
from serving.observability.recall_canary import canary_recall
from serving.observability.watching import EngineState, watched
from tests.small_index import build, units


class HalfBlind:
    """Finds every second of the exact nearest when asked approximately."""

    def __init__(self, live: LiveIndex) -> None:
        self._view = live.view()
        self.num_vectors, self.dim = self._view.num_vectors, self._view.dim

    def search(self, queries: Float32[ndarray, "queries dim"], parameters: SearchParameters) -> SearchHits:
        if parameters.exact:
            return self._view.search(queries, parameters)
        hits = self._view.search(queries, replace(parameters, k=2 * parameters.k))
        return SearchHits(ids=hits.ids[:, ::2], scores=hits.scores[:, ::2])

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        return self._view.vectors_of(ids)

    def ids(self) -> Int64[ndarray, "vectors"]:
        return self._view.ids()


@pytest.fixture
def live(tmp_path: Path) -> LiveIndex:
    build(tmp_path / "index")
    return LiveIndex.open(tmp_path / "index")


class TestRecall:
    def test_is_one_for_exact_search_and_half_for_half(self, live: LiveIndex) -> None:
        assert canary_recall(live.view(), [0, 7, 39], k=10) == 1
        assert canary_recall(HalfBlind(live), [0, 7, 39], k=10) == pytest.approx(0.5)

    def test_counts_what_there_is_where_the_gallery_is_small(self, live: LiveIndex) -> None:
        live.delete(list(range(3, 40)))
        assert canary_recall(live.view(), [0, 1], k=10) == 1

    def test_leaves_out_what_was_deleted_and_knows_nothing_where_all_were(self, live: LiveIndex) -> None:
        live.delete([0, 7])
        assert canary_recall(live.view(), [0, 7, 39], k=10) == 1
        assert canary_recall(live.view(), [0, 7], k=10) is None


def test_state_and_recall_are_told_again_and_again_and_failures_do_no_harm(live: LiveIndex) -> None:
    metrics, calls = ServingMetrics(), 0

    def state() -> EngineState:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("just now not")
        return EngineState(
            HalfBlind(live), "v0001", None, [0, 7], 0.99, 10, num_changes=live.num_changes,
            queues={"encode": QueueState(calls, 0.5)},
        )  # fmt: skip

    async def run() -> None:
        async with watched(state, metrics, canary_seconds=0.01, period_seconds=0.01):
            await _until(lambda: _value(metrics, "lookalike_recall_canary_ratio", k="10") == pytest.approx(0.5))
            live.add(units(900))
            await _until(lambda: _value(metrics, "lookalike_index_vectors") == 41)
            await _until(lambda: calls > 4)  # the one that failed, and one after it
            await _until(lambda: (_value(metrics, "lookalike_queue_length", queue="encode") or 0) > 1)
        told = _value(metrics, "lookalike_event_loop_lag_seconds_count")
        await asyncio.sleep(0.05)
        assert _value(metrics, "lookalike_event_loop_lag_seconds_count") == told  # it has ended

    asyncio.run(run())
    assert calls > 3
    assert _value(metrics, "lookalike_index_changes") == 1
    assert _value(metrics, "lookalike_recall_expected_ratio", k="10") == 0.99
    assert (_value(metrics, "lookalike_queue_length", queue="encode") or 0) > 1
    assert _value(metrics, "lookalike_queue_age_seconds", queue="encode") == 0.5


def test_a_blocked_event_loop_shows(live: LiveIndex) -> None:
    metrics = ServingMetrics()

    async def run() -> None:
        state = EngineState(live.view(), "v0001", None, [0], 1.0, 10)
        async with watched(lambda: state, metrics, canary_seconds=None, period_seconds=0.01):
            await _until(lambda: (_value(metrics, "lookalike_event_loop_lag_seconds_count") or 0) > 0)
            before = _value(metrics, "lookalike_event_loop_lag_seconds_sum") or 0
            await asyncio.sleep(0)
            time.sleep(0.2)
            await _until(lambda: (_value(metrics, "lookalike_event_loop_lag_seconds_sum") or 0) - before > 0.1)

    asyncio.run(run())
    assert _value(metrics, "lookalike_recall_canary_ratio", k="10") is None


def test_the_canary_of_a_slow_index_runs_seldom(live: LiveIndex) -> None:
    num_measured = 0

    class Slow(HalfBlind):
        def search(self, queries: Float32[ndarray, "queries dim"], parameters: SearchParameters) -> SearchHits:
            nonlocal num_measured
            if parameters.exact:
                num_measured += 1
                time.sleep(0.05)
            return super().search(queries, parameters)

    async def run() -> None:
        state = EngineState(Slow(live), "v0001", None, [0], 1.0, 10)
        async with watched(lambda: state, ServingMetrics(), canary_seconds=0.001):
            await _until(lambda: num_measured > 0)
            await asyncio.sleep(0.3)

    asyncio.run(run())
    assert num_measured == 1  # 50 ms may come once in five seconds


def _value(metrics: ServingMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)
