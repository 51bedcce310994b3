"""Searches, changes, compactions and swaps at once: what was acknowledged is seen, what was deleted is not."""

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from indexing.living.journal import Journal
from indexing.living.live_index import LiveIndex
from indexing.versions import versions_of
from lookalike.records import SearchParameters
from tests.small_index import build, units


def run_together(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_every_search_sees_what_was_acknowledged_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build(folder)
    acknowledged: set[int] = set()
    deleted: set[int] = set()
    is_over = threading.Event()
    with closing(LiveIndex.open(folder)) as live, closing(LiveIndex.open(folder)) as other:

        def change() -> None:
            try:
                for step in range(60):
                    index = (live, other)[step % 2]
                    [added] = index.add(units(1000 + step))
                    acknowledged.add(int(added))
                    if step % 3 == 2:
                        acknowledged.discard(int(added))
                        index.delete([added])
                        deleted.add(int(added))
            finally:
                is_over.set()

        def search(index: LiveIndex) -> None:
            while not is_over.is_set():
                there, gone = set(acknowledged), set(deleted)
                view = index.view()
                ids = set(view.ids().tolist())
                assert gone.isdisjoint(ids)
                # One that is to be deleted is taken from the list first.
                assert there - ids <= there - acknowledged
                hits = view.search(units(7), SearchParameters(k=200)).ids[0]
                assert set(hits[hits >= 0].tolist()) == ids

        def swap() -> None:
            while not is_over.is_set():
                live.compact(keep_versions=2)
                for index, version in zip((other, live), versions_of(folder), strict=False):
                    index.publish(version)

        run_together(change, swap, lambda: search(live), lambda: search(other))
        assert live.ids().tolist() == other.ids().tolist() == sorted({*range(40), *acknowledged})
        assert not acknowledged & deleted
        assert len(acknowledged) == 40


def test_a_version_opened_in_the_background_hides_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "index"
    build(folder)
    build(folder, first_seed=300)
    read, is_open, may_install = Journal.changes_after, threading.Event(), threading.Event()

    def read_and_wait(journal: Journal, sequence: int, **options: int) -> object:
        found = read(journal, sequence, **options)
        if threading.current_thread().name == "swapper" and not is_open.is_set():
            is_open.set()
            assert may_install.wait(30)
        return found

    with closing(LiveIndex.open(folder)) as live, closing(LiveIndex.open(folder)) as writer:
        writer.add(units(1))
        live.view()
        monkeypatch.setattr(Journal, "changes_after", read_and_wait)
        swapper = threading.Thread(target=live.publish, args=("v0001",), name="swapper")
        [added] = writer.add(units(2))
        swapper.start()
        assert is_open.wait(30)
        # The new version has read the journal but does not serve yet: the old one must not take this for its own.
        assert added in live.view().ids()
        [later] = writer.add(units(3))
        may_install.set()
        swapper.join()
        assert {int(added), int(later)} <= set(live.view().ids().tolist())
        assert live.view().base.version == "v0001"
        np.testing.assert_array_equal(live.ids(), writer.ids())
