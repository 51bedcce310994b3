"""A compaction holds what was there, and neither a change nor a kill in between loses anything."""

import multiprocessing
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import indexing.living.compaction as compaction
from indexing.building import staging
from indexing.building.staging import Staging
from indexing.living.compaction import CompactedSource, compact_index
from indexing.living.journal import Journal, JournalTransaction
from indexing.living.live_index import LiveIndex
from indexing.published_index import PublishedIndex
from indexing.versions import current_version, publish, set_current_version, versions_of
from lookalike.errors import DataError, ResourceError
from lookalike.records import SearchParameters
from tests.small_index import DIM, change, content, units

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "indexing.living.compaction"])


def test_a_compaction_holds_what_was_there(folder: Path, live: LiveIndex) -> None:
    change(live)
    before, hits = content(live), live.search(units(700, 5, 3), SearchParameters(k=50))
    assert live.compact() == current_version(folder) == "v0002"
    assert content(live) == before
    after = live.search(units(700, 5, 3), SearchParameters(k=50))
    np.testing.assert_array_equal(after.ids, hits.ids)
    np.testing.assert_array_equal(after.scores, hits.scores)
    view = live.view()
    assert (view.delta.num_vectors, len(view.delta.hidden), live.num_changes) == (0, 0, 0)
    assert view.base.manifest.details["absorbed_sequence"] == 6
    assert view.base.manifest.parents["base"] == PublishedIndex.open(folder, version="v0001").fingerprint
    view.base.check()
    [next_id] = live.add(units(704))
    assert next_id == 43
    with closing(LiveIndex.open(folder)) as reopened:
        assert content(reopened) == content(live)


def test_without_changes_nothing_is_built(folder: Path, live: LiveIndex) -> None:
    assert live.compact() == "v0001"
    assert versions_of(folder) == ["v0001"]


def test_when_everything_was_deleted_there_is_nothing_to_build_from(folder: Path, live: LiveIndex) -> None:
    live.delete(live.ids())
    with pytest.raises(DataError, match="all vectors were deleted"):
        live.compact()
    assert live.num_vectors == 0


def test_changes_during_a_compaction_stay(folder: Path, live: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    change(live)
    publish_staged = Staging.publish

    def change_and_publish(staged: Staging) -> None:
        live.add(units(800), [{"key": "meanwhile"}])
        live.delete([0, 40])
        assert live.search(units(800), SearchParameters(k=1)).ids[0, 0] == 43
        publish_staged(staged)

    monkeypatch.setattr(Staging, "publish", change_and_publish)
    done = live.compact_in_background()
    assert done.result(timeout=60) == "v0002"
    assert live.num_changes == 3
    ids = live.ids().tolist()
    assert ids == [1, 2, *range(4, 40), 42, 43]
    assert live.metadata_of(np.array([43]))[0]["key"] == "meanwhile"
    with closing(LiveIndex.open(folder)) as reopened:
        assert content(reopened) == content(live)


def test_during_a_compaction_nobody_else_compacts_or_publishes(
    folder: Path, live: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(live)
    publish_staged, refused = Staging.publish, []

    def compact_again(staged: Staging) -> None:
        for attempt in (lambda: compact_index(folder), lambda: publish(folder, "v0001"), lambda: live.publish("v0001")):
            with pytest.raises(ResourceError, match="is being compacted"):
                attempt()
            refused.append(attempt)
        publish_staged(staged)

    monkeypatch.setattr(Staging, "publish", compact_again)
    live.compact()
    assert len(refused) == 3


def test_the_source_of_a_compaction_streams_in_order_of_ids(
    folder: Path, live: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_BLOCK_BYTES", 7 * 4 * DIM)
    change(live)
    live.add(units(900, 901), ids=[1000, 3])
    source = CompactedSource(PublishedIndex.open(folder), live.journal.changes_after(0).changes)
    blocks = list(source.blocks())
    assert max(len(block.ids) for block in blocks) == 7
    ids = np.concatenate([block.ids for block in blocks])
    np.testing.assert_array_equal(ids, source.ids())
    np.testing.assert_array_equal(ids, live.ids())
    np.testing.assert_array_equal(np.concatenate([block.vectors for block in blocks]), live.vectors_of(ids))
    shuffled = np.random.default_rng(0).permutation(ids)
    assert source.metadata_of(shuffled).to_pylist() == live.metadata_of(shuffled)
    assert source.num_vectors == len(ids)
    source.check()


def test_equal_bases_and_changes_give_equal_versions(folder: Path, tmp_path: Path, live: LiveIndex) -> None:
    change(live)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    live.compact()
    compact_index(other)
    assert PublishedIndex.open(other).fingerprint == PublishedIndex.open(folder).fingerprint


def _compact_and_die(folder: Path, moment: str) -> None:
    """Runs a compaction that is killed, by the operating system, at a moment of its life."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    set_current, rmtree, set_fact = set_current_version, shutil.rmtree, JournalTransaction.set_fact
    match moment:
        case "before the version is whole":
            Staging.publish = die  # type: ignore[method-assign]
        case "between whole and current":
            staging.set_current_version = die  # type: ignore[assignment]
        case "right after it is current":
            staging.set_current_version = lambda *a: (set_current(*a), die())  # type: ignore
        case "while an old version is removed":
            shutil.rmtree = lambda path, **options: (  # type: ignore[assignment]
                next(Path(path).glob("*.npy")).unlink() if ".outgoing" in str(path) else None,
                die() if ".outgoing" in str(path) else rmtree(path, **options),
            )
        case "inside the trimming":
            JournalTransaction.set_fact = lambda self, name, value: (  # type: ignore[method-assign, assignment]
                die() if name == "trimmed_through" else set_fact(self, name, value)
            )
    compact_index(folder, keep_versions=1)


@pytest.mark.parametrize(
    "moment",
    [
        "before the version is whole",
        "between whole and current",
        "right after it is current",
        "while an old version is removed",
        "inside the trimming",
    ],
)
def test_a_killed_compaction_is_done_again_and_nothing_is_lost_or_doubled(
    folder: Path, live: LiveIndex, moment: str
) -> None:
    change(live)
    before = content(live)
    process = _context.Process(target=_compact_and_die, args=(folder, moment))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL, "it was to be killed at a moment that never came"
    assert content(live) == before
    with closing(LiveIndex.open(folder)) as reopened:
        assert content(reopened) == before
        [added] = reopened.add(units(710), [{"key": "later"}])
    before = content(live)
    assert added in before
    compact_index(folder, keep_versions=1)
    compact_index(folder, keep_versions=1)
    assert content(live) == before
    with closing(LiveIndex.open(folder)) as reopened:
        assert content(reopened) == before
        assert reopened.num_changes == 0
    assert len(versions_of(folder)) == 1
    assert not list(folder.glob(".unfinished-*"))
    assert not list(folder.glob(".outgoing-*"))
    with closing(Journal(folder)) as journal:
        assert journal.num_changes_after(0) == 0
