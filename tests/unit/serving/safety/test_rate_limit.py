import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.safety.rate_limit import TokenBuckets, retry_after
from serving.settings import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class PlainBucket:
    """The slow twin: a bucket that is filled as time goes by."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst, self.tokens, self.seen = rate, burst, float(burst), 1000.0

    def take(self, now: float, num_tokens: int) -> bool:
        self.tokens = min(self.burst, self.tokens + (now - self.seen) * self.rate)
        self.seen = now
        if self.tokens + 1e-6 < min(num_tokens, self.burst):
            return False
        self.tokens -= num_tokens
        return True


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(1, 8)), max_size=60),
)
def test_gives_what_buckets_that_fill_give(rate: int, burst: int, asked: list[tuple[int, int, int]]) -> None:
    clock = Clock()
    buckets = TokenBuckets(RateLimit(requests_per_second=rate, burst=burst), clock=clock)
    plain = [PlainBucket(rate, burst) for _ in range(3)]
    for quarter_seconds, client, num_tokens in asked:
        clock.now += quarter_seconds / 4  # exact in binary
        wait = buckets.take(str(client), num_tokens)
        assert (wait == 0) == plain[client].take(clock.now, num_tokens)
        if wait:
            # It is enough to wait as long as one is told, and a moment less is not.
            before, clock.now = clock.now, clock.now + wait - 0.01
            assert buckets.take(str(client), num_tokens) > 0
            clock.now = before


def test_a_refusal_costs_nothing_and_its_wait_is_enough() -> None:
    clock = Clock()
    buckets = TokenBuckets(RateLimit(requests_per_second=2, burst=1), clock=clock)
    assert buckets.take("a") == 0
    waits = [buckets.take("a") for _ in range(5)]
    assert waits == [pytest.approx(0.5)] * 5
    clock.now += waits[-1]
    assert buckets.take("a") == 0


def test_memory_is_bounded_by_clients_and_the_silent_are_forgotten() -> None:
    clock = Clock()
    buckets = TokenBuckets(RateLimit(requests_per_second=0.001, burst=5, max_clients=100), clock=clock)
    for number in range(10_000):
        buckets.take(f"address 10.0.{number >> 8}.{number & 255}")
        assert len(buckets) <= 100
    # Who keeps asking is remembered among all those who come once.
    refused = 0
    for number in range(1_000):
        refused += buckets.take("busy") > 0
        buckets.take(f"once {number}")
    assert refused == 995


def test_full_buckets_take_no_memory() -> None:
    clock = Clock()
    buckets = TokenBuckets(RateLimit(requests_per_second=10, burst=5), clock=clock)
    for number in range(1_000):
        clock.now += 1
        buckets.take(f"client {number}")
    assert len(buckets) <= 2


def test_a_hundred_thousand_clients_take_some_twenty_megabytes() -> None:
    buckets = TokenBuckets(RateLimit(requests_per_second=0.001), clock=Clock())
    tracemalloc.start()
    for number in range(10_000):
        buckets.take(f"address 192.168.{number >> 8}.{number & 255}")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 10 * size < 40e6


def test_retry_after_is_in_whole_seconds_from_one() -> None:
    assert [retry_after(seconds) for seconds in (1e-9, 0.2, 1.0, 1.01, 99.5)] == ["1", "1", "1", "2", "100"]
