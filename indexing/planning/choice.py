"""Which of several candidates to take: the cheapest that keeps every wish, or the nearest to that.

Exact search is taken where it is fast enough, or where nothing else is much faster, as in collections without
structure. Otherwise speed counts, and memory by its fourth root: four times the memory must buy an answer in 1/1.4 of
the time. Without a wish for latency all of it goes by nominal rates, so the same
vectors and settings give the same plan on every machine and at every load.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from indexing.index_types import IndexType
from indexing.planning.trials import Trial
from indexing.settings import IndexSettings

# A scan that takes less, alone or as a share of a batch, is not worth replacing where no latency is asked for.
UNNOTICED_SECONDS = 2e-3
# So much faster must an approximation be.
PRICE_OF_EXACTNESS = 4.0
_WEIGHT_OF_MEMORY = 0.25
# A trial's few hundred queries tell no finer.
_RECALL_TOLERANCE = 0.002


@dataclass(frozen=True, slots=True)
class Candidate:
    """One index type with all that speaks for or against it."""

    index_type: IndexType
    trial: Trial
    memory: int  # bytes that searches keep occupied
    nominal_seconds: float  # of a query, at nominal rates
    seconds: float  # of a query, on this machine
    build_seconds: float

    def cost(self) -> float:
        """The same on every machine; only ratios mean anything."""
        return float(self.nominal_seconds * self.memory**_WEIGHT_OF_MEMORY)

    def is_fast_enough(self, settings: IndexSettings) -> bool:
        """Where it keeps all wishes: whether nobody asked for more speed than this."""
        return settings.latency is not None or self.nominal_seconds <= UNNOTICED_SECONDS

    def broken_wishes(self, settings: IndexSettings, *, ram: int | None) -> dict[str, float]:
        """By how much, as the logarithm of a ratio, each wish is missed; empty where all are kept."""
        broken = {}
        if self.trial.recall < settings.recall - _RECALL_TOLERANCE:
            broken["recall"] = math.log((1 - self.trial.recall) / max(1 - settings.recall, 1e-3))
        if ram is not None and self.memory > ram:
            broken["ram"] = math.log(self.memory / ram)
        if settings.latency is not None and 1000 * self.seconds > settings.latency:
            broken["latency"] = math.log(1000 * self.seconds / settings.latency)
        return broken


def choose(candidates: Sequence[Candidate], settings: IndexSettings, *, ram: int | None) -> Candidate:
    """The best that keeps all wishes; where none does, the one that misses them by the least."""
    kept = [candidate for candidate in candidates if not candidate.broken_wishes(settings, ram=ram)]
    if not kept:
        return min(candidates, key=lambda c: (sum(c.broken_wishes(settings, ram=ram).values()), c.cost()))
    cheapest = min(kept, key=Candidate.cost)
    exact = next((candidate for candidate in kept if candidate.index_type.family == "flat"), None)
    if exact is None:
        return cheapest
    is_unrivalled = exact.nominal_seconds < PRICE_OF_EXACTNESS * cheapest.nominal_seconds
    return exact if settings.mode == "evaluation" or exact.is_fast_enough(settings) or is_unrivalled else cheapest
