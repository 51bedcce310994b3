"""Batches: what is worked on together, what each job gets, and what happens around them."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.batching import Batcher, Done
from serving.engine.errors import OverloadedError


class Gate:
    """Work that waits until it is let go, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.has_begun = threading.Semaphore(0)
        self.may_go_on = threading.Semaphore(0)

    def __call__(self, jobs: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(jobs))
        self.has_begun.release()
        assert self.may_go_on.acquire(timeout=10)
        return [job * 10 for job in jobs]


async def begun(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.has_begun.acquire, timeout=10)


def test_an_idle_stage_takes_one_job_at_once_and_a_busy_one_what_has_gathered() -> None:
    gate = Gate()
    batcher = Batcher(gate, name="test", max_size=4)

    async def ask() -> list[Done[int]]:
        first = asyncio.create_task(batcher.run(0))
        await begun(gate)
        others = [asyncio.create_task(batcher.run(job)) for job in range(1, 7)]
        await asyncio.sleep(0)  # lets all of them ask
        assert batcher.num_waiting == 6
        assert batcher.seconds_waited > 0
        gate.may_go_on.release(3)
        return await asyncio.gather(first, *others)

    done = asyncio.run(ask())
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [one.result for one in done] == [0, 10, 20, 30, 40, 50, 60]
    assert [one.batch_size for one in done] == [1, 4, 4, 4, 4, 2, 2]
    assert batcher.num_waiting == 0
    batcher.close()


def test_a_busy_stage_waits_for_a_fuller_batch_but_no_longer_than_told() -> None:
    gate = Gate()
    patient = Batcher(gate, name="test", max_size=2, max_wait_seconds=30.0)

    async def ask() -> None:
        first = asyncio.create_task(patient.run(0))
        await begun(gate)
        second = asyncio.create_task(patient.run(1))
        await asyncio.sleep(0)
        gate.may_go_on.release(10)
        await first
        await asyncio.sleep(0.01)
        assert gate.batches == [[0]]  # half a minute is not over: job 1 waits for company
        await asyncio.gather(second, patient.run(2))

    asyncio.run(ask())
    assert gate.batches == [[0], [1, 2]]
    patient.close()
    impatient = Batcher(gate, name="test", max_size=100, max_wait_seconds=0.001)

    async def ask_without_company() -> None:
        first = asyncio.create_task(impatient.run(3))
        await begun(gate)
        second = asyncio.create_task(impatient.run(4))
        await asyncio.gather(first, second)

    gate.may_go_on.release(10)
    asyncio.run(ask_without_company())
    assert gate.batches[2:] in ([[3], [4]], [[3, 4]])
    impatient.close()


def test_only_jobs_of_one_key_are_worked_on_together() -> None:
    gate = Gate()
    batcher = Batcher(gate, name="test", max_size=8, key=lambda job: job % 2)

    async def ask() -> None:
        first = asyncio.create_task(batcher.run(100))
        await begun(gate)
        others = [asyncio.create_task(batcher.run(job)) for job in (1, 2, 3, 4, 5)]
        await asyncio.sleep(0)
        gate.may_go_on.release(3)
        await asyncio.gather(first, *others)

    asyncio.run(ask())
    assert gate.batches == [[100], [1, 3, 5], [2, 4]]
    batcher.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["good", "returned", "raised"]), min_size=1, max_size=12))
def test_one_bad_job_never_fails_the_others(kinds: list[str]) -> None:
    def work(jobs: Sequence[int]) -> list[int | Exception]:
        if any(kinds[job] == "raised" for job in jobs):
            raise RuntimeError("worked on with a bad one")
        return [LookupError(str(job)) if kinds[job] == "returned" else job for job in jobs]

    batcher = Batcher(work, name="test", max_size=4)

    async def ask() -> list[Done[int] | BaseException]:
        return await asyncio.gather(*[batcher.run(job) for job in range(len(kinds))], return_exceptions=True)

    for job, (kind, outcome) in enumerate(zip(kinds, asyncio.run(ask()), strict=True)):
        if kind == "good":
            assert isinstance(outcome, Done)
            assert outcome.result == job
        else:
            assert isinstance(outcome, LookupError if kind == "returned" else RuntimeError)
    batcher.close()


def test_a_job_that_has_waited_past_its_deadline_or_that_nobody_waits_for_is_not_begun() -> None:
    gate = Gate()
    batcher = Batcher(gate, name="test", max_size=8)

    async def ask() -> None:
        first = asyncio.create_task(batcher.run(0))
        await begun(gate)
        late = asyncio.create_task(batcher.run(1, deadline_seconds=0.001))
        given_up = asyncio.create_task(batcher.run(2))
        patient = asyncio.create_task(batcher.run(3, deadline_seconds=60.0))
        await asyncio.sleep(0.01)
        given_up.cancel()
        gate.may_go_on.release(2)
        await asyncio.gather(first, patient)
        with pytest.raises(OverloadedError) as refusal:
            await late
        assert refusal.value.retry_after_seconds > 0.001

    asyncio.run(ask())
    assert gate.batches == [[0], [3]]
    batcher.close()


def test_several_event_loops_and_threads_share_a_batcher() -> None:
    batcher = Batcher(lambda jobs: [job + 1 for job in jobs], name="test", max_size=8, num_threads=3)

    def ask() -> None:
        async def many() -> list[Done[int]]:
            return await asyncio.gather(*[batcher.run(job) for job in range(200)])

        results.append([done.result for done in asyncio.run(many())])

    results: list[list[int]] = []
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(1, 201))] * 4
    batcher.close()


def test_closing_finishes_what_waits_and_then_nothing_is_taken() -> None:
    gate = Gate()
    gate.may_go_on.release(10)
    batcher = Batcher(gate, name="test", max_size=1)

    async def ask() -> None:
        jobs = [asyncio.create_task(batcher.run(job)) for job in range(4)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        assert [done.result for done in await asyncio.gather(*jobs)] == [0, 10, 20, 30]
        with pytest.raises(OverloadedError):
            await batcher.run(5)

    asyncio.run(ask())


def test_a_batch_that_cannot_be_counted_is_worked_on_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def broken(size: int) -> None:
        raise OSError("no room for metrics")

    batcher = Batcher(lambda jobs: [job * 10 for job in jobs], name="test", max_size=4, on_batch=broken)
    assert [asyncio.run(batcher.run(job)).result for job in (1, 2)] == [10, 20]
    batcher.close()
    assert "could not be counted" in caplog.text
