"""Connections: how many there may be, and how long each may keep the server waiting.

uvicorn waits without end for the headers of a connection's first request, and for clients that do not take their
answers. (A body that does not come is ended by `serving.middleware.BodyLimit`.)
"""

import asyncio
import uuid
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.problems import PROBLEM_KINDS, PROBLEM_MEDIA_TYPE
from serving.schemas.problems import ProblemDetails
from serving.settings import ServingLimits

_MOST_HEADER_BYTES = 64 << 10
# Requests that wait behind the one that is being answered; asyncio hands over 256 KiB, or 14,000 of them, at once.
_MOST_SENT_AHEAD = 64
# In the longest wait; with the default, whoever takes 13 kbit/s gets every answer.
_LEAST_BYTES_TAKEN = 16 << 10


def guarded_protocol(limits: ServingLimits) -> type[asyncio.Protocol]:
    """For `uvicorn.Config(http=...)`."""

    class GuardedProtocol(_GuardedProtocol):
        max_connections, max_wait_seconds = limits.max_connections, limits.max_wait_seconds

    return GuardedProtocol


class _GuardedProtocol(HttpToolsProtocol):
    max_connections: int
    max_wait_seconds: float
    _timer: asyncio.TimerHandle | None = None
    _num_header_bytes = 0  # since a request's headers, a part of its body, or all of it came

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse("server.busy", f"more than {self.max_connections} connections", {"Retry-After": "1"})
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        super().data_received(data)
        # httptools has no limit of its own; also what comes behind a request that is being answered is kept.
        if self._num_header_bytes > _MOST_HEADER_BYTES and not self.transport.is_closing():
            self._refuse("request.malformed", f"the headers are longer than {_MOST_HEADER_BYTES} bytes", {})

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._num_header_bytes = 0
        if len(self.pipeline) > _MOST_SENT_AHEAD:
            raise ValueError(f"more than {_MOST_SENT_AHEAD} requests sent ahead")  # the parser stops: no more are made

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if not self.cycle.response_complete:
            self._num_header_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_header_bytes = 0

    def on_response_complete(self) -> None:
        cycle = self.cycle
        super().on_response_complete()
        # With another cycle, a request that was sent ahead has begun.
        if self.cycle is cycle:
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own answer to what is not HTTP has not the shape of a problem."""
        self._refuse("request.malformed", msg, {})

    def _watch(self) -> None:
        """Looks again after the longest wait: at the next request, or at how much of the answer has been taken."""
        if self._timer is not None:
            self._timer.cancel()
        num_unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.max_wait_seconds, self._end_if_idle, self.cycle, num_unsent)

    def _end_if_idle(self, cycle: Any, num_unsent_before: int) -> None:
        is_waiting = self._is_waiting_since(cycle)
        if not is_waiting and not self.flow.write_paused:
            return
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent and num_unsent_before - num_unsent >= _LEAST_BYTES_TAKEN:
            self._watch()
        else:
            # Not `close`, which waits until the client has taken the rest.
            self.transport.abort()

    def _is_waiting_since(self, cycle: Any) -> bool:
        """Whether no request has begun since `cycle`, which is over."""
        return self.cycle is cycle and (cycle is None or cycle.response_complete)

    def _refuse(self, code: str, detail: str, headers: dict[str, str]) -> None:
        kind = PROBLEM_KINDS[code]
        phrase = HTTPStatus(kind.status).phrase
        details = ProblemDetails(
            title=phrase,
            status=kind.status,
            detail=detail,
            code=code,
            fix=kind.fix,
            request_id=uuid.uuid4().hex,
        )
        body = details.model_dump_json(exclude_none=True).encode()
        lines = [
            f"HTTP/1.1 {kind.status} {phrase}",
            f"Content-Type: {PROBLEM_MEDIA_TYPE}",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
