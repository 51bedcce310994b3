"""Every number that a server tells Prometheus, each declared once, with a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class QueueState:
    """A bounded queue at one moment."""

    length: int
    age_seconds: float  # how long the oldest has waited; 0 where none waits


class ServingMetrics:
    """The numbers of one worker. Methods may be called from any thread; none of them blocks."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Registers with `registry`, or with a new one of its own."""
        self.registry = registry or CollectorRegistry()
        self._requests = Counter(
            "lookalike_requests",
            "Requests answered, by method, route and HTTP status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._request_seconds = self._histogram(
            "lookalike_request_seconds", "From the first byte of a request to the last of its answer.", "route"
        )
        self._in_progress = self._gauge(
            "lookalike_requests_in_progress", "Requests that have come in and are not yet answered.", mode="livesum"
        )
        self._refused = Counter(
            "lookalike_refused",
            "Requests that ended in a problem, by its code; `server.overloaded` is admission control.",
            ["code"],
            registry=self.registry,
        )
        self._stage_seconds = self._histogram(
            "lookalike_stage_seconds",
            "Time of one search in each stage: open (a version that does not serve), decode, encode, queue (waiting), "
            "search, rerank, metadata, total.",
            "stage",
        )
        self._batch_size = Histogram(
            "lookalike_batch_size",
            "Queries that went through the encoder, or through one exact search, together.",
            ["kind"],
            buckets=_SIZES,
            registry=self.registry,
        )
        self._queue_length = self._gauge(
            "lookalike_queue_length", "Queries that wait in a queue.", "queue", mode="livesum"
        )
        self._queue_age = self._gauge(
            "lookalike_queue_age_seconds", "How long the oldest query in a queue has waited.", "queue", mode="livemax"
        )
        self._loop_lag = Histogram(
            "lookalike_event_loop_lag_seconds",
            "How much later than asked the event loop woke up; sampled once a second.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._index_workers = self._gauge(
            "lookalike_index_workers",
            "Workers that serve this version of the index, with this encoder; 0 once they have left it.",
            "index_version",
            "encoder_fingerprint",
            mode="livesum",
        )
        self._vectors = self._gauge("lookalike_index_vectors", "Pictures that can be found.", mode="livemax")
        self._changes = self._gauge(
            "lookalike_index_changes", "Changes in the journal that no compaction has taken in.", mode="livemax"
        )
        self._swaps = Counter(
            "lookalike_index_swaps",
            "Changes to another version: `done`, or `refused` where it failed its check and the old one stayed.",
            ["outcome"],
            registry=self.registry,
        )
        self._recall = self._gauge(
            "lookalike_recall_canary_ratio",
            "Share of the exact nearest that a default search of the stored queries finds; the worst worker's.",
            "k",
            mode="livemin",
        )
        self._expected_recall = self._gauge(
            "lookalike_recall_expected_ratio",
            "Recall that the build of the index measured, at the default effort; 1 for exact search.",
            "k",
            mode="livemin",
        )
        self._recall_time = self._gauge(
            "lookalike_recall_canary_timestamp_seconds",
            "When the recall canary last finished, in Unix time; the worker that is furthest behind.",
            "k",
            mode="livemin",
        )
        self._recall_failures = Counter(
            "lookalike_recall_canary_failures", "Measurements of the recall canary that failed.", registry=self.registry
        )
        self._index: tuple[str, str] | None = None

    def request_started(self) -> None:
        self._in_progress.inc()

    def request_ended(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """
        Args:
            route: The template, such as `/v1/items/{id}`: addresses themselves would be endlessly many.
        """
        self._in_progress.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def count_refused(self, code: str) -> None:
        """`code` is one of `PROBLEM_KINDS`."""
        self._refused.labels(code).inc()

    def observe_stages(self, timings_ms: Mapping[str, float]) -> None:
        """`Answer.timings_ms` of one search."""
        for stage, milliseconds in timings_ms.items():
            self._stage_seconds.labels(stage).observe(milliseconds / 1000)

    def observe_batch(self, kind: str, size: int) -> None:
        """`kind` is `encode` or `search`."""
        self._batch_size.labels(kind).observe(size)

    def set_queue(self, queue: str, state: QueueState) -> None:
        self._queue_length.labels(queue).set(state.length)
        self._queue_age.labels(queue).set(state.age_seconds)

    def observe_loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def set_index_version(self, version: str, *, encoder_fingerprint: str | None) -> None:
        """What this worker serves from now on."""
        served = (version, encoder_fingerprint or "none")
        if self._index not in (None, served):
            # Labels cannot be removed in multiprocess mode.
            self._index_workers.labels(*self._index).set(0)
        self._index_workers.labels(*served).set(1)
        self._index = served

    def set_index_size(self, *, num_vectors: int, num_changes: int) -> None:
        self._vectors.set(num_vectors)
        self._changes.set(num_changes)

    def count_swap(self, *, is_done: bool) -> None:
        self._swaps.labels("done" if is_done else "refused").inc()

    def set_expected_recall(self, recall: float, *, k: int) -> None:
        self._expected_recall.labels(str(k)).set(recall)

    def set_canary_recall(self, recall: float, *, k: int, time_seconds: float) -> None:
        """
        Args:
            time_seconds: Unix time.
        """
        # Gauges without a label would tell 0 until the first measurement.
        self._recall.labels(str(k)).set(recall)
        self._recall_time.labels(str(k)).set(time_seconds)

    def count_canary_failure(self) -> None:
        self._recall_failures.inc()

    def _histogram(self, name: str, sentence: str, label: str) -> Histogram:
        return Histogram(name, sentence, [label], buckets=_SECONDS, registry=self.registry)

    def _gauge(self, name: str, sentence: str, *labels: str, mode: str) -> Gauge:
        """`mode` says what several workers' values become together; `live` ones forget workers that have ended."""
        return Gauge(name, sentence, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]
