"""Runs the application on a port until it is told to stop."""

import contextlib
import errno
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from indexing.published_index import read_index_manifest
from indexing.versions import current_version
from lookalike.errors import ResourceError
from lookalike.native_libraries import leave_torch_out, load_torch, num_cores
from serving.addresses import host_in_url, is_loopback
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.observability.metrics import ServingMetrics
from serving.safety.api_keys import open_keys
from serving.safety.slow_clients import guarded_protocol
from serving.settings import ServingSettings
from serving.worker_processes import serve_with_processes

_SECONDS_TO_FINISH = 10
_SECONDS_TO_CLOSE = 10

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
        SettingsError: keys are required where there are none, or cannot be read; found out before anything slow.
        ResourceError: the port or address cannot be had; found out before anything slow.
        ArtifactError: index, encoder or shards are missing, damaged or do not match.
    """
    keys = open_keys(settings)
    with _bound_socket(settings.host, settings.port) as listener:
        if keys is None and not is_loopback(listener.getsockname()[0]):
            logger.warning("listening on %s: everyone who reaches it can search and see all pictures", settings.host)
        if settings.num_processes == 1:
            serve_on(listener, settings, on_ready)
        else:
            serve_with_processes(
                serve_on,
                listener,
                settings,
                num_processes=settings.num_processes,
                seconds_to_finish=_SECONDS_TO_FINISH + _SECONDS_TO_CLOSE,
                on_ready=on_ready,
            )


def serve_on(listener: socket.socket, settings: ServingSettings, on_ready: Callable[[RunningServer], None]) -> None:
    """Serves in this process on a bound socket; raises ArtifactError as `serve` does."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # It warns of every form that is malformed.
    cores = max(1, num_cores() // settings.num_processes)
    vectors_only = settings.engine.vectors_only or not _has_encoder(settings.index)
    if vectors_only and "torch" not in sys.modules:
        leave_torch_out()
    elif settings.num_processes > 1:
        load_torch(num_threads=cores)
    metrics = ServingMetrics()
    engine = QueryEngine.open(
        settings.index,
        shards_folder=settings.shards,
        num_workers=settings.num_workers or cores,
        settings=settings.engine.model_copy(update={"vectors_only": vectors_only}),
        picture_limits=settings.limits.pictures,
        metrics=metrics,
    )
    host, port, view = settings.host, listener.getsockname()[1], engine.served().view
    running = RunningServer(f"http://{host_in_url(host)}:{port}/", host, port, view.base.version, view.num_vectors)
    config = uvicorn.Config(
        create_app(engine, settings, metrics),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=guarded_protocol(settings.limits),
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    with contextlib.closing(engine):  # The application closes it too, if it gets to start.
        _Server(config, warm_up=engine.warm_up, on_started=lambda: on_ready(running)).run(sockets=[listener])


def _has_encoder(index: Path) -> bool:
    """Whether the current version can make vectors of pictures; reads its manifest alone."""
    return "encoder_fingerprint" in read_index_manifest(index / current_version(index)).details


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
        # What was loaded stays for good: it is not to be looked through for garbage again and again.
        gc.collect()
        gc.freeze()
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
