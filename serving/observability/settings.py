"""What a server tells about itself. Imports neither torch nor faiss, nor anything else that is slow."""

from typing import Annotated, Literal

from pydantic import Field

from lookalike.settings import Settings


class ObservabilitySettings(Settings):
    """Logs, traces and the recall canary; metrics are always at /metrics."""

    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object per line for programs. Neither ever holds a picture or a vector."""
    sends_traces: bool = False
    """Whether requests become OpenTelemetry spans, sent to where OTEL_EXPORTER_OTLP_ENDPOINT says; takes the extra
    `tracing`."""
    canary_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = 60.0
    """Time between two measurements of the recall canary; None: it is off. One that takes long is run less often, so
    that it gets 1% of the time at most."""
