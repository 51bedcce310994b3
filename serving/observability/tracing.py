"""OpenTelemetry spans of requests and their stages, where they are asked for; otherwise nothing, at no cost.

Standard variables say where they go and which are kept: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lookalike.errors import ResourceError

_SERVICE = "lookalike"
_of_this_request: ContextVar["Tracing | None"] = ContextVar("tracing_of_this_request", default=None)


def record_stages(spans_ns: Mapping[str, tuple[int, int]]) -> None:
    """Tells the stages of a search, in the task of its request: name -> start and end, in nanoseconds of Unix time."""
    if (tracing := _of_this_request.get()) is not None:
        tracing.record_stages(spans_ns)


class Tracing:
    """Spans of one worker. This one makes none."""

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator["RequestSpan"]:
        """Around one request; `headers` (names in lower case) may tell the caller's span in `traceparent`."""
        yield RequestSpan()

    def record_stages(self, spans_ns: Mapping[str, tuple[int, int]]) -> None:
        """See the function of this name."""

    def close(self) -> None:
        """Sends what is not sent yet."""


class RequestSpan:
    """The span of one request; this one goes nowhere."""

    def end(self, *, route: str, status: int, request_id: str | None) -> None:
        """Says what became of it."""


class OpenTelemetryTracing(Tracing):
    """Spans as the SDK makes them. Searches are children of the caller's span where it sent one."""

    def __init__(self, provider: Any) -> None:
        """
        Args:
            provider: A `TracerProvider` of the SDK.
        """
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._trace = provider, trace
        self._tracer = provider.get_tracer(_SERVICE)
        self._callers = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[RequestSpan]:
        caller = self._callers.extract(headers)
        kind = self._trace.SpanKind.SERVER
        with self._tracer.start_as_current_span(method, context=caller, kind=kind) as span:
            before = _of_this_request.set(self)
            try:
                yield _OpenTelemetrySpan(span, method)
            finally:
                _of_this_request.reset(before)

    def record_stages(self, spans_ns: Mapping[str, tuple[int, int]]) -> None:
        for name, (started, ended) in spans_ns.items():
            self._tracer.start_span(name, start_time=started).end(end_time=ended)

    def close(self) -> None:
        self._provider.shutdown()


class _OpenTelemetrySpan(RequestSpan):
    def __init__(self, span: Any, method: str) -> None:
        self._span, self._method = span, method

    def end(self, *, route: str, status: int, request_id: str | None) -> None:
        # Names as OpenTelemetry's conventions for HTTP have them.
        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": self._method,
                "http.route": route,
                "http.response.status_code": status,
                "lookalike.request_id": request_id or "",
            }
        )


def open_tracing(*, sends_traces: bool) -> Tracing:
    """
    Raises:
        ResourceError: traces are asked for, and the extra `tracing` is not installed.
    """
    if not sends_traces:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ResourceError(
            f"observability.sends_traces is on, but {error.name} is not installed. Install the extra `tracing`, or "
            "turn it off."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenTelemetryTracing(provider)
