"""Token buckets: how much each client may ask. Imports no web framework."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from serving.settings import RateLimit


class TokenBuckets:
    """One bucket per client, full at first, in a bounded amount of memory. For one thread.

    A bucket is one number: the time at which it will be full again (the generic cell rate algorithm, ITU-T I.371). One
    that is full needs no memory, and beyond `max_clients` the bucket untouched for longest is taken for full.
    """

    def __init__(self, limit: RateLimit, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_per_token = 1 / limit.requests_per_second
        self._seconds_to_fill = limit.burst * self._seconds_per_token
        self._max_clients, self._clock = limit.max_clients, clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # the client touched last comes last

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str, num_tokens: int = 1) -> float:
        """Takes tokens and returns 0, or takes none and returns the seconds until there are as many.

        More than a whole bucket's are given when the bucket is full, and paid for later: a batch longer than the burst
        would never be answered otherwise.
        """
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now)
        price = num_tokens * self._seconds_per_token
        wait = full_at + min(price, self._seconds_to_fill) - self._seconds_to_fill - now
        # A millionth of a token is the rounding of floats, not a debt.
        if wait > 1e-6 * self._seconds_per_token:
            self._full_at.move_to_end(client)  # Or a refusal would bring a client nearer to being forgotten.
            return wait
        self._full_at[client] = full_at + price
        self._full_at.move_to_end(client)
        self._forget(now)
        return 0.0

    def _forget(self, now: float) -> None:
        # Two a call at most: memory stays bounded without a call that sweeps through all.
        for _ in range(2):
            oldest = next(iter(self._full_at))
            if self._full_at[oldest] > now and len(self._full_at) <= self._max_clients:
                return
            del self._full_at[oldest]


def retry_after(seconds: float) -> str:
    """The value of a Retry-After header: whole seconds, 1 or more."""
    return str(max(1, math.ceil(seconds)))
