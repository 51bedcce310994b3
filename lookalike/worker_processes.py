"""What every worker process of a pool does first."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection


def prepare_worker() -> None:
    """Makes a worker end with its parent, which it would outlive after a kill, and end on Ctrl-C without words."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
