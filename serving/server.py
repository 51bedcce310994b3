"""Runs the application on a port until it is told to stop."""

import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import uvicorn

from lookalike.errors import ResourceError
from serving.addresses import host_in_url, is_loopback
from serving.app import create_app
from serving.query_engine import QueryEngine
from serving.settings import ServingSettings

_SECONDS_TO_FINISH = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that takes requests."""

    url: str
    host: str
    port: int
    index_version: str
    num_vectors: int


def serve(settings: ServingSettings, *, on_ready: Callable[[RunningServer], None]) -> None:
    """Serves until Ctrl-C or SIGTERM, then finishes running requests and returns.

    `on_ready` is called once requests are taken; with port 0 it learns the real port.

    Raises:
        ResourceError: the port or address cannot be had; found out before anything slow.
        ArtifactError: index, encoder or shards are missing, damaged or do not match.
    """
    with _bound_socket(settings.host, settings.port) as listener:
        engine = QueryEngine.open(settings.index, shards_folder=settings.shards, num_workers=settings.num_workers)
        host, port = settings.host, listener.getsockname()[1]
        if not is_loopback(listener.getsockname()[0]):
            logger.warning("listening on %s: everyone who reaches it can search and see all pictures", host)
        running = RunningServer(
            f"http://{host_in_url(host)}:{port}/", host, port, engine.index.version, engine.index.num_vectors
        )
        config = uvicorn.Config(
            create_app(engine, settings),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
        )
        with contextlib.closing(engine):  # The application closes it too, if it gets to start.
            _Server(config, warm_up=engine.warm_up, on_started=lambda: on_ready(running)).run(sockets=[listener])


def require_free_port(host: str, port: int) -> None:
    """For whoever works long before it serves: raises what `serve` would, if the port cannot be had now."""
    _bound_socket(host, port).close()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, *, warm_up: Callable[[], Awaitable[None]], on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._warm_up, self._on_started = warm_up, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Not when the application starts: of an error there, uvicorn leaves no more than an exit with its own code.
        await self._warm_up()
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own version raises the signal again once it has stopped, so a clean stop would look like a kill.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _bound_socket(host: str, port: int) -> socket.socket:
    """Bound but not yet listening: clients are refused, not kept waiting, until requests are taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ResourceError(f"host {host!r} is not an address of this machine: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} on {host} is taken by another program. "
                "Stop that one, or give another --port (0 takes a free one)."
            ) from error
        raise ResourceError(f"cannot listen on port {port} of {host}: {error.strerror}.") from error
    return listener
