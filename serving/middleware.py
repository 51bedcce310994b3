"""Around every request: an id, safe headers, an answer to unexpected errors, an end to bodies that are too long or too
slow, and no answer to foreign names.

Plain ASGI, because Starlette's BaseHTTPMiddleware costs more than a whole search by vector.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.observability.json_logs import current_request_id
from serving.problems import Problem, problem_of, problem_response

REQUEST_ID_HEADER = "X-Request-ID"
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",  # blob: shows the picture that a person just picked
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_SAFE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_PORT = re.compile(r":\d*\Z")
_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Its own, because whoever seeds the shared generator would make ids repeat.
_request_ids = random.Random()

logger = logging.getLogger(__name__)


class RequestEnvelope:
    """Outermost: whatever happens inside, the answer has a request id, safe headers and the shape of a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        current_request_id.set(request_id)
        started = time.perf_counter()
        status: int | None = None

        async def send_enveloped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_enveloped)
        # The path is logged as a literal: it comes decoded, and its line breaks would forge lines of the log.
        except ClientDisconnect:
            logger.info("%s %r left before its answer, request %s", scope["method"], scope["path"], request_id)
            return
        except Exception as error:
            problem = problem_of(error)
            scope["state"]["problem_code"] = problem.code  # for the metrics
            if problem.code == "server.error":
                logger.exception("%s %r failed, request %s", scope["method"], scope["path"], request_id)
            if status is not None:
                raise
            await problem_response(problem, request_id=request_id)(scope, receive, send_enveloped)
        logger.log(
            logging.DEBUG if status is not None and status < 400 else logging.INFO,
            "%s %r %s in %.1f ms, request %s",
            scope["method"],
            scope["path"],
            status,
            1000 * (time.perf_counter() - started),
            request_id,
        )


class KnownHosts:
    """Refuses requests whose Host is none of `hosts`, whatever the port.

    For servers that only this machine reaches: a website can make its name point at 127.0.0.1, and its scripts, running
    in a browser on this machine, would then count as ours and read every picture.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).getlist("host")
            if len(given) != 1 or _PORT.sub("", given[0]).lower() not in self._hosts:
                raise Problem("host.not_allowed", f"this server answers to {', '.join(sorted(self._hosts))} only")
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body by its announced length, as soon as more than `max_bytes` of it have come in, or once it has been
    coming for longer than `max_seconds`; and any that has more to come while all requests that run have brought
    `max_bytes_at_once` together."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_seconds: float, max_bytes_at_once: int) -> None:
        self._app, self._max_bytes, self._max_seconds = app, max_bytes, max_seconds
        self._max_bytes_at_once, self._bytes_held = max_bytes_at_once, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise self._too_large()
        deadline = asyncio.get_running_loop().time() + self._max_seconds
        num_received, num_fetched, is_complete, refusal = 0, 0, False, None

        def hold(num_bytes: int) -> None:
            nonlocal num_fetched
            if self._bytes_held + num_bytes > self._max_bytes_at_once:
                raise self._too_many()
            num_fetched += num_bytes
            self._bytes_held += num_bytes

        # For pictures that the body names by address: they are held as long as the body is.
        scope.setdefault("state", {})["hold_bytes"] = hold

        async def receive_bounded() -> Message:
            nonlocal num_received, is_complete, refusal
            if is_complete:
                # All that can still come is that the client leaves, which may take as long as the answer.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                refusal = self._too_slow()
                raise refusal from None
            num_bytes = len(message.get("body", b""))
            num_received += num_bytes
            self._bytes_held += num_bytes
            is_complete = not message.get("more_body", False)
            if num_received > self._max_bytes:
                refusal = self._too_large()
            elif num_bytes and self._bytes_held > max(self._max_bytes_at_once, num_received):
                refusal = self._too_many()
            if refusal is not None:
                raise refusal
            return message

        async def send_unless_refused(message: Message) -> None:
            # The framework takes what is raised while it reads a body for a fault of the body's own, and says so.
            if refusal is None:
                await send(message)

        try:
            await self._app(scope, receive_bounded, send_unless_refused)
        finally:
            self._bytes_held -= num_received + num_fetched
        if refusal is not None:
            raise refusal

    def _too_large(self) -> Problem:
        # Without the header the server would go on reading the rest of the body to keep the connection.
        detail = f"the body is longer than {self._max_bytes} bytes"
        return Problem("body.too_large", detail, headers={"Connection": "close"})

    def _too_many(self) -> Problem:
        detail = f"the requests that run hold more than {self._max_bytes_at_once} bytes"
        return Problem("server.busy", detail, headers={"Connection": "close", "Retry-After": "1"})

    def _too_slow(self) -> Problem:
        detail = f"the body did not come within {self._max_seconds:g} seconds"
        return Problem("body.too_slow", detail, headers={"Connection": "close"})


def _request_id(given: str | None) -> str:
    # Not a secret: a system call for each request would cost more than it is worth.
    return (
        given if given is not None and _CLIENT_REQUEST_ID.fullmatch(given) else f"{_request_ids.getrandbits(128):032x}"
    )
