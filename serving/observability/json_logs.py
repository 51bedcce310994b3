"""The log as one JSON object per line, and the id of the request in every line that belongs to one."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

# Of the request that the current task or thread works for. Threads of a pool have none, unless they run in a copy of
# the request's context.
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)

_STANDARD = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}
# In characters. Nobody logs a picture on purpose; one that slips in shall not fill disks.
_LONGEST_TEXT = 2_000


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `process`, `message`; where there is one, `request_id` and `error`; and `extra`.

    A value of `extra` that is not a number, a text, a truth value or None is left out, and its type said instead:
    pictures and vectors are not for logs.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": _cut(record.getMessage()),
        }
        if (request_id := current_request_id.get()) is not None:
            line["request_id"] = request_id
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                line[name] = _plain(value)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_log_format(log_format: Literal["text", "json"]) -> None:
    """Gives the handlers that the command has set up this format; `text` leaves them as they are."""
    if log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value)
    return value if value is None or isinstance(value, bool | int | float) else f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}... ({len(text)} characters)"
