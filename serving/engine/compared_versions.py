"""Versions that do not serve, opened for the searches that name them; those named last stay open."""

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from indexing.living.live_index import LiveIndex
from indexing.living.live_view import LiveView
from lookalike.errors import ArtifactError, ResourceError
from serving.engine.admission import Admission
from serving.engine.errors import (
    ComparisonOffError,
    OverloadedError,
    VersionRefusedError,
    VersionUnavailableError,
    version_refusals,
)
from serving.engine.served_index import Served, ServedIndex
from serving.engine.stages import Stages

# Opening takes seconds, and whoever asks for what cannot be opened asks again.
_SECONDS_BETWEEN_TRIES = 5.0
# Who comes back waits for the rest of the opening, not for another one.
_SECONDS_BETWEEN_LOOKS = 1.0

logger = logging.getLogger(__name__)


class OpenVersion:
    """One version and the changes after it, those that are still to come included. Safe to use from many threads."""

    def __init__(self, live: LiveIndex, version: str) -> None:
        """Raises ArtifactError and ResourceError, as publishing it would."""
        self._live = live
        self._lock = threading.Lock()
        stamp = live.journal.stamp()  # before reading: at worst there is one look too many
        self._last = live.open_version(version), stamp

    def view_at_hand(self) -> LiveView | None:
        """All that is durable at this moment, unless it has yet to be read. Microseconds."""
        view, stamp = self._last
        return view if stamp == self._live.journal.stamp() else None

    def view(self) -> LiveView:
        """All that is durable at this moment, read where it must be; raises as it was opened."""
        with self._lock:
            view, known = self._last
            stamp = self._live.journal.stamp()
            if stamp != known:
                view = self._live.brought_up_to_date(view)
                self._last = view, stamp
            return view


class _Refusal:
    """Why a version was not opened; whoever asks gets an error of their own, which holds nothing of what was opened."""

    def __init__(self, error: ArtifactError | ResourceError) -> None:
        self._kind, self._message = type(error), str(error)
        self.holds_until = time.monotonic() + _SECONDS_BETWEEN_TRIES

    def error(self) -> Exception:
        return self._kind(self._message)


class ComparedVersions:
    """Safe to use from many threads, and by the tasks of several event loops."""

    def __init__(self, index: ServedIndex, *, most_open: int, most_waiting: int) -> None:
        """
        Args:
            most_open: Versions beside the one that serves; 0: there are none.
            most_waiting: Searches, for versions to be opened or to take in what was written.
        """
        self._index, self._most_open = index, most_open
        self._waiting = Admission("searches that wait for a version", most_inside=most_waiting, most_seconds=math.inf)
        # One after the other: each takes memory and all cores.
        self._openers = ThreadPoolExecutor(1, thread_name_prefix="compared versions")
        # They would wait for each other anyway, and must wait neither for an opening nor in the way of searches.
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="changes of compared versions")
        self._lock = threading.Lock()  # around the three below
        self._open: OrderedDict[str, OpenVersion] = OrderedDict()  # the one named last comes last
        self._opening: dict[str, Future[OpenVersion | _Refusal]] = {}
        self._refusals: dict[str, _Refusal] = {}

    async def named(self, version: str, serving: Served, stages: Stages, *, deadline_seconds: float) -> Served:
        """What the index would hold at this moment if `version` were published; `serving` where that is its name.

        Raises:
            OverloadedError: too many wait already, or it is not open before the deadline; opening it goes on.
            UnknownVersionError: there is no such version.
            VersionRefusedError: it could not be published.
            VersionUnavailableError: it cannot be opened at this moment.
            ComparisonOffError: it does not serve, and no other can be searched.
        """
        if version == serving.index_version:
            return serving
        if not self._most_open:
            raise ComparisonOffError(
                f"this server searches version {serving.index_version}, which serves, and no other: its setting "
                "engine.max_compared_versions is 0"
            )
        found = self._at_hand(version)
        if isinstance(found, Future):
            found = await self._when_open(version, found, stages, deadline_seconds)
        if isinstance(found, _Refusal):
            raise found.error()
        try:
            with version_refusals(self._index.folder):
                view = found.view_at_hand()
                if view is None:
                    view = await self._read(found)
        except VersionRefusedError:
            self._forget(version)  # changes have come that it cannot go with
            raise
        return replace(self._index.serving(view), shown_by=serving)

    def forget_gone(self, serving: Served) -> None:
        """Lets go of what serves now, or has been removed. Microseconds, or nothing where nothing is open."""
        if not self._open:
            return
        with self._lock:
            for version in list(self._open):
                if version == serving.index_version or not (self._index.folder / version).is_dir():
                    del self._open[version]

    def close(self) -> None:
        """Waits for what is being opened."""
        self._openers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        with self._lock:
            self._open.clear()

    def _at_hand(self, version: str) -> "OpenVersion | _Refusal | Future[OpenVersion | _Refusal]":
        """What there is of a version, or will be. Raises UnknownVersionError."""
        with self._lock:
            if version in self._open:
                self._open.move_to_end(version)
                return self._open[version]
            refusal = self._refusals.get(version)
            if refusal is not None and time.monotonic() < refusal.holds_until:
                return refusal
            if version not in self._opening:
                self._index.require_version(version)
                self._opening[version] = self._openers.submit(self._opened, version)
            return self._opening[version]

    async def _when_open(
        self, version: str, opening: "Future[OpenVersion | _Refusal]", stages: Stages, deadline_seconds: float
    ) -> OpenVersion | _Refusal:
        started = time.perf_counter()
        with self._waiting.entering():
            try:
                # Shielded, or the first to leave would take it from the others.
                return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(opening)), deadline_seconds)
            except TimeoutError:
                raise OverloadedError(
                    f"version {version} is still being opened, after {deadline_seconds:.2g} s",
                    retry_after_seconds=_SECONDS_BETWEEN_LOOKS,
                ) from None
            finally:
                stages.count("open", time.perf_counter() - started)

    async def _read(self, opened: OpenVersion) -> LiveView:
        with self._waiting.entering():
            return await asyncio.get_running_loop().run_in_executor(self._readers, opened.view)

    def _forget(self, version: str) -> None:
        with self._lock:
            self._open.pop(version, None)

    def _opened(self, version: str) -> OpenVersion | _Refusal:
        try:
            with self._lock:
                while len(self._open) >= self._most_open:
                    self._open.popitem(last=False)
            started = time.perf_counter()
            with version_refusals(self._index.folder):
                opened = OpenVersion(self._index.live, version)
            with self._lock:
                self._open[version] = opened
                self._refusals.pop(version, None)
            logger.info(
                "version %s is open beside the one that serves, after %.1f s", version, time.perf_counter() - started
            )
            return opened
        except (VersionRefusedError, VersionUnavailableError) as error:
            refusal = _Refusal(error)
            with self._lock:
                self._refusals[version] = refusal
            return refusal
        finally:
            with self._lock:
                del self._opening[version]
