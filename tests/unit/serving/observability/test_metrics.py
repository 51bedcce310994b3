import subprocess
import sys
import time

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serving.observability.exposition import forget_worker, metrics_response, shared_by_workers
from serving.observability.metrics import QueueState, ServingMetrics

# What a worker of its own process does until it is told to end; it prints what it would answer a scrape.
_WORKER = """
import sys
from serving.observability.exposition import metrics_response
from serving.observability.metrics import QueueState, ServingMetrics

metrics, version, recall = ServingMetrics(), sys.argv[1], float(sys.argv[2])
for _ in range(3):
    metrics.request_started()
    metrics.request_ended(method="GET", route="/", status=200, seconds=0.004)
metrics.set_queue("encode", QueueState(2, 0.5))
metrics.set_index_version("v0001", encoder_fingerprint=None)
metrics.set_index_version(version, encoder_fingerprint=None)
if recall:
    metrics.set_canary_recall(recall, k=10, time_seconds=1.0)
print("ready", flush=True)
for line in sys.stdin:
    print(metrics_response(metrics.registry).body.decode(), end="# END\\n", flush=True)
"""


def _samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, label values in the order of their names) -> value, buckets left out."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def _told(metrics: ServingMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    return _samples(bytes(metrics_response(metrics.registry).body).decode())


def test_what_is_observed_is_told() -> None:
    metrics = ServingMetrics()
    metrics.observe_stages({"search": 30.0, "total": 40.0})
    metrics.observe_stages({"search": 10.0, "total": 10.0})
    metrics.observe_batch("encode", 7)
    metrics.count_refused("server.overloaded")
    metrics.count_swap(is_done=True)
    metrics.count_swap(is_done=False)
    metrics.set_queue("search", QueueState(3, 0.25))
    metrics.set_index_size(num_vectors=100, num_changes=4)
    metrics.set_expected_recall(0.99, k=10)
    metrics.set_canary_recall(0.97, k=10, time_seconds=5.0)
    told = _told(metrics)
    assert told["lookalike_stage_seconds_sum", ("search",)] == pytest.approx(0.040)
    assert told["lookalike_stage_seconds_count", ("total",)] == 2
    assert told["lookalike_batch_size_sum", ("encode",)] == 7
    assert told["lookalike_refused_total", ("server.overloaded",)] == 1
    assert told["lookalike_index_swaps_total", ("done",)] == told["lookalike_index_swaps_total", ("refused",)] == 1
    assert told["lookalike_queue_length", ("search",)] == 3
    assert told["lookalike_queue_age_seconds", ("search",)] == 0.25
    assert told["lookalike_index_vectors", ()] == 100
    assert told["lookalike_index_changes", ()] == 4
    assert told["lookalike_recall_expected_ratio", ("10",)] == 0.99
    assert told["lookalike_recall_canary_ratio", ("10",)] == 0.97


def test_recall_is_not_told_before_it_was_measured() -> None:
    assert not [name for name, _ in _told(ServingMetrics()) if "recall_canary_ratio" in name]


def test_another_index_version_takes_the_place_of_the_one_before() -> None:
    metrics = ServingMetrics()
    for version in ("v0001", "v0002", "v0002"):
        metrics.set_index_version(version, encoder_fingerprint="3f9c")
    told = _told(metrics)
    assert told["lookalike_index_workers", ("3f9c", "v0001")] == 0
    assert told["lookalike_index_workers", ("3f9c", "v0002")] == 1


def test_two_workers_answer_for_each_other_until_one_has_ended() -> None:
    with shared_by_workers():
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, version, recall],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for version, recall in (("v0002", "0"), ("v0003", "0.9"))
        ]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            first, second = (_scrape(worker) for worker in workers)
            assert first == second
            assert first["lookalike_requests_total", ("GET", "/", "200")] == 6
            assert first["lookalike_request_seconds_sum", ("/",)] == pytest.approx(6 * 0.004)
            assert first["lookalike_queue_length", ("encode",)] == 4
            assert first["lookalike_queue_age_seconds", ("encode",)] == 0.5
            assert [first["lookalike_index_workers", ("none", f"v000{n}")] for n in (1, 2, 3)] == [0, 1, 1]
            # The worker that has not measured yet does not count as one that finds nothing.
            assert first["lookalike_recall_canary_ratio", ("10",)] == 0.9

            workers[1].kill()
            workers[1].wait(timeout=20)
            forget_worker(workers[1].pid)
            left = _scrape(workers[0])
            assert left["lookalike_requests_total", ("GET", "/", "200")] == 6
            assert left["lookalike_queue_length", ("encode",)] == 2
            assert ("lookalike_index_workers", ("none", "v0003")) not in left
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate(timeout=20)


def _start_worker(version: str, recall: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _WORKER, version, recall]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _scrape(worker: "subprocess.Popen[str]") -> dict[tuple[str, tuple[str, ...]], float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("scrape\n")
    worker.stdin.flush()
    return _samples("".join(iter(worker.stdout.readline, "# END\n")))


def test_the_numbers_of_a_request_cost_little_beside_a_search() -> None:
    metrics = ServingMetrics(CollectorRegistry())

    def one() -> None:
        metrics.request_started()
        metrics.observe_stages({"queue": 1.0, "search": 1.0, "rerank": 1.0, "metadata": 1.0, "total": 1.0})
        metrics.request_ended(method="POST", route="/v1/search", status=200, seconds=0.001)

    one()
    started = time.process_time()
    for _ in range(500):
        one()
    # Some 12 microseconds; a search may take 2 ms. Ten times as much is allowed, for slow machines.
    assert (time.process_time() - started) / 500 < 120e-6


class TestServer:
    def test_requests_are_counted_by_route_whatever_their_address(self, client: TestClient) -> None:
        before = _samples(client.get("/metrics").text)
        for path in ("/v1/items/1", "/v1/items/2", "/v1/items/999999", "/no/such/address"):
            client.get(path)
        client.request("BREW", "/v1/items/1")
        client.get("/")
        client.get("/page/page.js")
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        told = _samples(answer.text)

        def more(name: str, *labels: str) -> float:
            return told[name, labels] - before.get((name, labels), 0)

        assert more("lookalike_requests_total", "GET", "/v1/items/{id}", "200") == 2
        assert more("lookalike_requests_total", "GET", "/v1/items/{id}", "404") == 1
        assert more("lookalike_requests_total", "GET", "none", "404") == 1
        assert more("lookalike_requests_total", "GET", "/", "200") == 1
        assert more("lookalike_requests_total", "GET", "/page", "200") == 1
        assert more("lookalike_refused_total", "item.unknown") == 1
        assert more("lookalike_refused_total", "route.unknown") == 1
        assert more("lookalike_request_seconds_count", "/v1/items/{id}") >= 3
        assert [labels for name, labels in told if name == "lookalike_requests_total" and labels[0] == "other"]
        assert told["lookalike_requests_in_progress", ()] == 1  # the scrape itself

    def test_what_middleware_refuses_is_counted(self, client: TestClient) -> None:
        refused = ("lookalike_refused_total", ("host.not_allowed",))
        before = _samples(client.get("/metrics").text).get(refused, 0)
        client.get("/v1/info", headers={"Host": "evil.example"})
        assert _samples(client.get("/metrics").text)[refused] == before + 1

    def test_index_and_recall_are_told(self, client: TestClient) -> None:
        wanted = {"lookalike_index_vectors", "lookalike_recall_canary_ratio", "lookalike_recall_expected_ratio"}
        deadline = time.monotonic() + 20
        told = _samples(client.get("/metrics").text)
        while not wanted <= {name for name, _ in told}:
            assert time.monotonic() < deadline
            told = _samples(client.get("/metrics").text)
        assert told["lookalike_index_vectors", ()] == 24
        assert told["lookalike_recall_canary_ratio", ("10",)] == 1
        assert 1.0 in [value for (name, _), value in told.items() if name == "lookalike_index_workers"]
