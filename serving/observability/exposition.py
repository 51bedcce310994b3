"""How Prometheus gets the numbers of one worker, or of several on one port.

Several share their numbers through files in a folder (Prometheus's multiprocess mode), so that whichever of them
answers a scrape answers for all.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess
from starlette.responses import Response

# prometheus_client reads it once, when it is first imported.
_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def metrics_response(registry: CollectorRegistry) -> Response:
    """What Prometheus scrapes: the numbers of all workers where they share them, else those of `registry`."""
    if os.environ.get(_FOLDER_VARIABLE):
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@contextmanager
def shared_by_workers() -> Iterator[None]:
    """Processes started inside the block share their metrics. They must be started afresh, not forked off.

    When one has ended, whoever started it calls `forget_worker`: its counts stay, its gauges go.
    """
    before = os.environ.get(_FOLDER_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="lookalike-metrics-") as folder:
        os.environ[_FOLDER_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_FOLDER_VARIABLE]
            else:
                os.environ[_FOLDER_VARIABLE] = before


def forget_worker(process_id: int) -> None:
    """See `shared_by_workers`."""
    multiprocess.mark_process_dead(process_id)
