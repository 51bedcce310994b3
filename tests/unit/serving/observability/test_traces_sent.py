"""What a collector gets: real requests over a real socket, in OTLP's own encoding."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.settings import ServingSettings
from tests.unit.serving.small_index import LOCAL, SmallIndex

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_CLOCKS_DIFFER_NS = 1_000_000  # a stage's length is of another clock than its end


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.received: list[tuple[str, str, ExportTraceServiceRequest]] = []  # path, content type, body

    def spans(self) -> list[Span]:
        return [
            span
            for _, _, request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = ExportTraceServiceRequest.FromString(body)
        self.server.received.append((self.path, self.headers["Content-Type"], request))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        yield collector
        collector.shutdown()
        thread.join(timeout=20)


def test_a_search_reaches_the_collector_with_its_stages(collector: Collector, small_index: SmallIndex) -> None:
    settings = ServingSettings.model_validate({"index": small_index.index, "observability": {"sends_traces": True}})
    photo = (small_index.pictures / "ring" / "teal.png").read_bytes()
    with TestClient(create_app(QueryEngine.open(small_index.index), settings), base_url=LOCAL) as client:
        answer = client.post(
            "/v1/search",
            files={"image": photo},
            headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-ID": "order-7"},
        )
        assert answer.status_code == 200
        client.get("/v1/items/99")
    # A server that stops sends what it has not sent yet.
    assert {(path, kind) for path, kind, _ in collector.received} == {("/v1/traces", "application/x-protobuf")}
    resource = collector.received[0][2].resource_spans[0].resource
    assert {a.key: a.value.string_value for a in resource.attributes}["service.name"] == "lookalike"
    spans = [span for span in collector.spans() if span.trace_id.hex() == TRACE]
    [request] = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert (request.name, request.parent_span_id.hex()) == ("POST /v1/search", CALLER)
    told = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}
    assert (told["http.response.status_code"], told["lookalike.request_id"]) == (200, "order-7")
    stages = [span for span in spans if span is not request]
    assert {span.name for span in stages} == answer.json()["timings_ms"].keys() - {"queue", "total"}
    assert {"decode", "encode", "search"} <= {span.name for span in stages}
    for stage in stages:
        assert stage.parent_span_id == request.span_id
        assert request.start_time_unix_nano - _CLOCKS_DIFFER_NS <= stage.start_time_unix_nano
        assert stage.start_time_unix_nano < stage.end_time_unix_nano <= request.end_time_unix_nano
    [missing] = [span for span in collector.spans() if span.name == "GET /v1/items/{id}"]
    assert missing.trace_id.hex() != TRACE
