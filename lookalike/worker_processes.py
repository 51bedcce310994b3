"""What every worker process of a pool does first."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection


def prepare_worker() -> None:
    """Makes a worker end with its parent, which it would outlive after a kill, and end on Ctrl-C without words.

    It ends on SIGTERM, too, even if it comes from a fork server that blocks that.
    """
    _end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def prepare_lasting_worker() -> None:
    """As `prepare_worker`, but of all who send SIGTERM only the parent ends this worker.

    Whoever stops a job often signals all of its processes, while the parent still needs this one to finish its step.
    The worker has to be born with SIGTERM blocked, or a signal that comes early ends it.
    """
    _end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent_pid = parent.pid

    def wait_and_exit() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_pid:
            pass
        os._exit(128 + signal.SIGTERM)

    if hasattr(signal, "sigwaitinfo"):  # macOS has none: there, such a worker ends with its parent alone
        threading.Thread(target=wait_and_exit, daemon=True).start()


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
