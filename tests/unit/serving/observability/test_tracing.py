import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lookalike.errors import ResourceError
from serving.observability.tracing import OpenTelemetryTracing, Tracing, open_tracing, record_stages


def test_without_being_asked_nothing_is_traced_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    tracing = open_tracing(sends_traces=False)
    with tracing.request("GET", {}) as span:
        record_stages({"search": (0, 1)})
        span.end(route="/", status=200, request_id="a")
    tracing.close()
    assert type(tracing) is Tracing
    assert not [name for name in sys.modules if name.startswith("opentelemetry")]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ResourceError, match="extra `tracing`"):
        open_tracing(sends_traces=True)


def test_stages_are_children_of_the_request_which_is_a_child_of_its_caller() -> None:
    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    tracing = OpenTelemetryTracing(provider)
    caller = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with tracing.request("POST", caller) as span:
        record_stages({"decode": (1_000, 3_000), "search": (3_000, 8_000)})
        span.end(route="/v1/search", status=200, request_id="order-7")
    record_stages({"outside": (0, 1)})  # of any request: nobody's
    with tracing.request("GET", {}):
        pass
    tracing.close()
    decode, search, request, other = exported.get_finished_spans()
    assert (decode.name, decode.start_time, decode.end_time) == ("decode", 1_000, 3_000)
    assert request.name == "POST /v1/search"
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["lookalike.request_id"] == "order-7"
    assert decode.parent is not None
    assert search.parent is not None
    assert request.context is not None
    assert decode.parent.span_id == search.parent.span_id == request.context.span_id
    assert request.parent is not None
    assert f"{request.parent.span_id:x}" == "b7ad6b7169203331"
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert other.parent is None
