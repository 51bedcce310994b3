"""Counts, times and traces every request, around everything else."""

import time

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.observability.metrics import ServingMetrics
from serving.observability.tracing import Tracing

# Names come from the client; one label for all that HTTP does not know.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ANSWER = 499  # as nginx calls it: the client left before its answer


class ObservedRequests:
    """Outermost: also sees what other middleware refuses."""

    def __init__(self, app: ASGIApp, *, metrics: ServingMetrics, tracing: Tracing) -> None:
        self._app, self._metrics, self._tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), _NO_ANSWER
        method = scope["method"] if scope["method"] in _METHODS else "other"

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.request_started()
        with self._tracing.request(method, Headers(scope=scope)) as span:
            try:
                await self._app(scope, receive, send_observed)
            finally:
                route, state = _route_of(scope), scope.get("state", {})
                seconds = time.perf_counter() - started
                self._metrics.request_ended(method=method, route=route, status=status, seconds=seconds)
                if (code := state.get("problem_code")) is not None:
                    self._metrics.count_refused(code)
                span.end(route=route, status=status, request_id=state.get("request_id"))


def _route_of(scope: Scope) -> str:
    """The template of the route that answered; `none` where there was none, such as for an unknown address."""
    route, root = scope.get("route"), scope.get("root_path", "")
    if not isinstance(route, Route):
        # Files are mounted below an address, which the mount has added to the root.
        return root.removeprefix(scope.get("app_root_path", root)) or "none"
    # A router's prefix is not part of what its routes know, but of the address: what lies before their own parts.
    parts = scope["path"].removeprefix(root).split("/")
    prefix = parts[: len(parts) - route.path.count("/")]
    return "/".join(prefix) + route.path
