"""The searches of all requests: who is let in, and which are done together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lookalike.native_libraries import load_faiss
from serving.engine.admission import Admission
from serving.engine.batching import Batcher, Done
from serving.engine.searching import Found, SearchJob, key_of, search_together
from serving.engine.settings import EngineSettings
from serving.observability.metrics import QueueState


class Searches:
    """Exact searches take turns, each on all cores; approximate ones run side by side, each on one."""

    def __init__(self, settings: EngineSettings, *, num_threads: int, on_batch: Callable[[int], None]) -> None:
        """
        Args:
            num_threads: That search approximately.
            on_batch: Told the size of each batch that is searched for.
        """
        self._admission = Admission(
            "searches", most_inside=settings.max_waiting_searches, most_seconds=settings.max_wait_seconds
        )
        self._exact: Batcher[SearchJob, Found] = Batcher(
            search_together,
            name="exact-search",
            key=key_of,
            max_size=settings.max_batch,
            max_wait_seconds=settings.max_batch_wait_ms / 1000,
            on_batch=on_batch,
        )
        self._approximate: Batcher[SearchJob, Found] = Batcher(
            search_together,
            name="search",
            key=key_of,
            max_size=settings.max_batch,
            num_threads=num_threads,
            on_batch=on_batch,
            initializer=lambda: _search_on_one_core(num_threads),
        )

    @contextmanager
    def entering(self, *, deadline_seconds: float, may_be_refused: bool) -> Iterator[None]:
        """Around `find`; raises OverloadedError where there is no room, or no time."""
        with self._admission.entering(deadline_seconds=deadline_seconds, may_be_refused=may_be_refused):
            yield

    async def find(self, job: SearchJob, *, deadline_seconds: float) -> Done[Found]:
        """Raises what `search_together` finds wrong with the job, and OverloadedError."""
        batcher = self._exact if job.is_exact else self._approximate
        return await batcher.run(job, deadline_seconds=deadline_seconds)

    def queue(self) -> QueueState:
        both = (self._exact, self._approximate)
        return QueueState(sum(one.num_waiting for one in both), max(one.seconds_waited for one in both))

    def close(self) -> None:
        self._exact.close()
        self._approximate.close()


def _search_on_one_core(num_threads: int) -> None:
    """faiss keeps the number of its threads for each thread that calls it."""
    if num_threads > 1:
        load_faiss(num_threads=1)
