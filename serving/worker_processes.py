"""Several processes that serve on one port: they share the socket, and the index through the page cache."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lookalike.errors import LookalikeError, ResourceError
from serving.observability.exposition import forget_worker, shared_by_workers

_SECONDS_TO_START = 600.0
# A process that ends sooner than this after its start is not replaced at once.
_SECONDS_OF_A_RUN = 5.0

logger = logging.getLogger(__name__)
# Serves on a socket until SIGTERM, and calls back once it takes requests.
ServeOn = Callable[[socket.socket, Any, Callable[[Any], None]], None]


def serve_with_processes(
    serve_on: ServeOn,
    listener: socket.socket,
    settings: Any,
    *,
    num_processes: int,
    seconds_to_finish: float,
    on_ready: Callable[[Any], None],
) -> None:
    """Serves until SIGINT or SIGTERM; a process that dies is replaced.

    Args:
        serve_on: A function of a module; called in each process with the socket and the settings.
        seconds_to_finish: How long processes get to finish running requests.
        on_ready: Told what the first one has told, once all take requests.

    Raises:
        LookalikeError: what kept a process from starting.
    """
    with shared_by_workers(), _stop_signal() as stop:
        group = _Group(serve_on, listener, settings)
        try:
            # The first alone: what is wrong with the index is told once, and its files are read once.
            workers = [group.start()]
            told = group.wait_until_ready(workers[0], stop)
            workers += [group.start() for _ in range(num_processes - 1)]
            for worker in workers[1:]:
                group.wait_until_ready(worker, stop)
            if not stop.is_set():
                on_ready(told)
            group.watch(stop)
        finally:
            group.end(seconds_to_finish)


class _Worker:
    def __init__(self, process: BaseProcess, tells: Connection) -> None:
        self.process, self.tells, self.started = process, tells, time.monotonic()


class _Group:
    def __init__(self, serve_on: ServeOn, listener: socket.socket, settings: Any) -> None:
        self._arguments = (serve_on, listener, settings)
        # Not forked: threads and the locks they hold do not survive that.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def start(self) -> _Worker:
        tells, told = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(*self._arguments, told, _log_level_and_format()))
        process.start()
        told.close()
        worker = _Worker(process, tells)
        self._workers.append(worker)
        return worker

    def wait_until_ready(self, worker: _Worker, stop: threading.Event) -> Any:
        """Raises LookalikeError where it fails to start."""
        until = time.monotonic() + _SECONDS_TO_START
        while not stop.is_set():
            if worker.tells.poll(0.2):
                try:
                    told = worker.tells.recv()
                except EOFError:
                    break
                if isinstance(told, LookalikeError):
                    raise told
                return told
            if time.monotonic() > until:
                raise ResourceError(f"a process was not ready to serve after {_SECONDS_TO_START:g} s.")
        if stop.is_set():
            return None
        worker.process.join()
        raise ResourceError(f"a process ended with code {worker.process.exitcode} before it could serve; see its log.")

    def watch(self, stop: threading.Event) -> None:
        """Replaces processes that die, until it is time to stop."""
        while not stop.is_set():
            ended = wait([worker.process.sentinel for worker in self._workers], timeout=0.5)
            for worker in [worker for worker in self._workers if worker.process.sentinel in ended]:
                if stop.is_set():
                    return
                self._forget(worker)
                worker.process.join(5)  # its sentinel is ready a moment before its exit code
                logger.error("process %d ended with code %s", worker.process.pid, worker.process.exitcode)
                lived = time.monotonic() - worker.started
                if lived < _SECONDS_OF_A_RUN:
                    stop.wait(_SECONDS_OF_A_RUN - lived)
                if not stop.is_set():
                    self.start()

    def end(self, seconds: float) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.terminate()
        until = time.monotonic() + seconds
        for worker in list(self._workers):
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.tells.close()
        assert worker.process.pid is not None
        forget_worker(worker.process.pid)


def _work(
    serve_on: ServeOn, listener: socket.socket, settings: Any, tells: Connection, log: tuple[int, logging.Formatter]
) -> None:
    """What a process does."""
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    logging.basicConfig(level=log[0], stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(log[1])
    try:
        serve_on(listener, settings, tells.send)
    except LookalikeError as error:
        with contextlib.suppress(OSError):
            tells.send(error)
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """A parent that was killed could not end its children, and these would keep the port."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _log_level_and_format() -> tuple[int, logging.Formatter]:
    root = logging.getLogger()
    formatter = next((handler.formatter for handler in root.handlers if handler.formatter), logging.Formatter())
    return root.level, formatter


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
