"""Versions change without a failed or mixed answer, and without losing a change."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.__main__ import main
from indexing.building import build as build_module
from indexing.living.compaction import compact_index
from indexing.living.journal import Journal
from indexing.living.live_index import LiveIndex
from indexing.versions import (
    current_version,
    publish,
    remove_old_versions,
    rollback,
    set_current_version,
    versions_of,
)
from lookalike.errors import ArtifactError, ManifestMismatch
from lookalike.records import SearchParameters
from tests.small_index import build, change, content, units


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def test_rollback_loses_no_change(folder: Path, live: LiveIndex) -> None:
    change(live)
    live.compact()
    live.add(units(720), [{"key": "after"}])
    before = content(live)
    assert live.rollback() == current_version(folder) == "v0001"
    assert (live.view().base.version, live.num_changes) == ("v0001", 7)
    assert content(live) == before
    live.delete([0])
    live.publish("v0002")
    assert content(live) == {i: row for i, row in before.items() if i != 0}
    assert live.num_changes == 2


def test_a_version_whose_changes_are_gone_is_not_published(folder: Path, live: LiveIndex) -> None:
    change(live)
    live.compact()
    live.add(units(721))
    kept = Path(shutil.copytree(folder / "v0001", folder.parent / "kept"))
    live.compact(keep_versions=1)
    assert versions_of(folder) == ["v0003"]
    kept.rename(folder / "v0001")
    for attempt in (lambda: publish(folder, "v0001"), lambda: live.publish("v0001"), live.rollback):
        with pytest.raises(ArtifactError, match=r"lacks the changes 1 to 7.*deleted pictures come back"):
            attempt()
    assert current_version(folder) == live.view().base.version == "v0003"


def test_another_version_is_opened_and_kept_up_to_date_without_changing_over(folder: Path, live: LiveIndex) -> None:
    change(live)
    live.compact()
    older = live.open_version("v0001")
    assert content(older) == content(live)
    live.add(units(720), [{"key": "after"}])
    live.delete([0])
    kept_up = live.brought_up_to_date(older)
    assert content(kept_up) == content(live) != content(older)
    assert live.view().base.version == current_version(folder) == "v0002"
    with pytest.raises(ArtifactError, match=r"has no version v0009; it has v0001, v0002"):
        live.open_version("v0009")
    # What it lacks is only in a version that took its place.
    live.compact(keep_versions=1)
    with pytest.raises(ArtifactError, match="lacks the changes"):
        live.brought_up_to_date(older)


def test_what_is_new_alone_tells_whether_an_open_version_may_go_on(
    live: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = live.view().base.manifest.details
    details["encoder_fingerprint"] = "a" * 64  # type: ignore[index]
    change(live)
    view = live.view()
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "makers_after", lambda self, sequence: pytest.fail("the whole journal was read"))
        live.add(units(720))
        live.delete([0])
        view = live.brought_up_to_date(view)
        assert content(view) == content(live)
    details["encoder_fingerprint"] = "b" * 64  # type: ignore[index]
    live.add(units(721))
    details["encoder_fingerprint"] = "a" * 64  # type: ignore[index]
    with pytest.raises(ManifestMismatch, match=r"by encoder aaaaaaaaaaaa, .* by encoder bbbbbbbbbbbb"):
        live.brought_up_to_date(view)


def test_a_version_of_other_vectors_is_not_published_over_changes(folder: Path, live: LiveIndex) -> None:
    other = build(folder, first_seed=300, dim=8)
    live.refresh()
    assert live.dim == 8
    live.rollback()
    live.add(units(1))
    with pytest.raises(ManifestMismatch, match=r"vectors of length 8.*additions of length 16"):
        live.publish(other)
    with pytest.raises(ManifestMismatch, match="start anew"):
        publish(folder, other)
    assert live.view().base.version == "v0001"


def test_a_process_behind_changes_over_before_it_takes_in_what_only_fits_the_new_version(
    folder: Path, live: LiveIndex
) -> None:
    with closing(LiveIndex.open(folder)) as behind:
        build(folder, first_seed=300, dim=8)
        live.refresh()
        [added] = live.add(units(77, dim=8))
        # Before its background thread has had its turn.
        with behind._view_lock:
            view = behind._catch_up()
        assert view.dim == 8
        assert added in view.ids()


def test_building_from_files_keeps_changes_or_is_refused_before_it_starts(folder: Path, live: LiveIndex) -> None:
    change(live)
    assert build(folder, first_seed=300) == "v0002"
    live.refresh()
    assert live.ids().tolist() == [0, 1, 2, *range(4, 41), 42]
    np.testing.assert_array_equal(live.vectors_of(np.array([0, 5, 40])), units(300, 703, 700))
    with pytest.raises(ManifestMismatch, match="build into another folder"):
        build(folder, first_seed=300, dim=8)
    live.compact(keep_versions=1)
    with pytest.raises(ArtifactError, match=r"v0004 lacks the changes 1 to 6"):
        build(folder, first_seed=400)
    assert versions_of(folder) == ["v0003"]
    assert not list(folder.glob(".unfinished-*"))


def test_changes_that_go_during_a_build_keep_its_version_from_becoming_current(
    folder: Path, live: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it as the current one, nobody could open the index: it lacks what has left the journal meanwhile."""
    change(live)
    live.compact(keep_versions=2)

    measured = build_module._measured

    def measured_meanwhile(*arguments: Any) -> Any:
        assert remove_old_versions(folder, keep=1) == ["v0001"]
        return measured(*arguments)

    monkeypatch.setattr(build_module, "_measured", measured_meanwhile)
    with pytest.raises(ArtifactError, match=r"v0003 lacks the changes 1 to 6"):
        build(folder, first_seed=400)
    with closing(LiveIndex.open(folder)) as opened:
        assert opened.ids().tolist() == live.ids().tolist()


def test_unknown_versions_and_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no version v0009; it has v0001"):
        publish(folder, "v0009")
    with pytest.raises(ArtifactError, match="no version before v0001"):
        rollback(folder)
    with pytest.raises(ArtifactError, match="is not an index"):
        LiveIndex.open(tmp_path / "none")
    with pytest.raises(ArtifactError, match="has no version v0001; it has none"):
        publish(tmp_path, "v0001")
    with pytest.raises(ArtifactError, match="is not an index"):
        compact_index(tmp_path)
    assert not list(tmp_path.glob("*.lock"))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        remove_old_versions(folder, keep=0)


def test_a_damaged_version_leaves_the_old_one_serving(
    folder: Path, live: LiveIndex, caplog: pytest.LogCaptureFixture
) -> None:
    version = build(folder, first_seed=300)
    set_current_version(folder, "v0001")
    whole = shutil.copytree(folder / version, folder.parent / "whole")
    (folder / version / "vectors.npy").unlink()
    with pytest.raises(ArtifactError):
        live.publish(version)
    assert current_version(folder) == "v0001"
    set_current_version(folder, version)  # by somebody who does not look
    live.search(units(1), SearchParameters(k=1))
    wait_until(lambda: "the index stays at version v0001" in caplog.text)
    assert live.search(units(1), SearchParameters(k=1)).ids[0, 0] == 1
    # Once it is whole again, it is found to be so.
    shutil.rmtree(folder / version)
    shutil.copytree(whole, folder / version)
    live._next_try = 0.0
    wait_until(lambda: live.view().base.version == version)


def test_old_versions_go_but_never_the_current_one_nor_the_newest(folder: Path) -> None:
    for seed in (100, 200, 300):
        build(folder, first_seed=seed)
    publish(folder, "v0002")
    assert remove_old_versions(folder, keep=1) == ["v0001", "v0003"]
    assert versions_of(folder) == ["v0002", "v0004"]
    with pytest.raises(ArtifactError, match="no version before v0002"):
        rollback(folder)


def test_a_removed_version_is_read_on_by_who_has_it_open(folder: Path, live: LiveIndex) -> None:
    view = live.view()
    change(live)
    live.compact(keep_versions=1)
    assert versions_of(folder) == ["v0002"]
    assert view.search(units(3), SearchParameters(k=1)).ids[0, 0] == 3
    assert view.metadata_of(np.array([3])) == [{"key": "3"}]


def test_a_process_that_slept_through_a_trimming_catches_up(folder: Path, live: LiveIndex) -> None:
    with closing(LiveIndex.open(folder)) as sleeper:
        change(live)
        live.compact(keep_versions=1)
        live.add(units(722))
        # Its version, and the changes between it and the next, are on no disk any more; it notices in time.
        with sleeper._view_lock:
            assert sleeper._catch_up().base.version == "v0002"
        assert content(sleeper) == content(live)


def test_other_openers_change_over_by_themselves(folder: Path, live: LiveIndex) -> None:
    with closing(LiveIndex.open(folder)) as other:
        build(folder, first_seed=300, first_id=500)
        for index in (live, other):
            wait_until(lambda index=index: index.view().base.version == "v0002")
            assert index.search(units(301), SearchParameters(k=1)).ids[0, 0] == 501


_ANSWERS_FROM_ITS_OWN_VIEW = """
import json, sys
from pathlib import Path
from indexing.living.live_index import LiveIndex
live = LiveIndex.open(Path(sys.argv[1]))
for _ in sys.stdin:
    view = live.view()
    print(json.dumps([view.base.version, view.ids().tolist()]), flush=True)
"""


def test_another_process_sees_each_change_at_once_and_changes_over_by_itself(folder: Path, live: LiveIndex) -> None:
    command = [sys.executable, "-c", _ANSWERS_FROM_ITS_OWN_VIEW, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> tuple[str, list[int]]:
            print("?", file=process.stdin, flush=True)
            version, ids = json.loads(process.stdout.readline())
            return version, ids

        assert ask() == ("v0001", live.ids().tolist())
        for seed in range(5):
            live.add(units(700 + seed))
            live.delete([seed])
            assert ask() == ("v0001", live.ids().tolist())
        live.compact(keep_versions=1)  # the version that it has open is removed
        live.add(units(800))
        assert ask()[1] == live.ids().tolist()
        wait_until(lambda: ask() == ("v0002", live.ids().tolist()))
        live.delete([10])
        assert ask() == ("v0002", live.ids().tolist())
        process.stdin.close()


def test_a_journal_taken_away_does_not_hide_later_changes(folder: Path, live: LiveIndex) -> None:
    change(live)
    live.compact()
    before = content(live)
    live.close()
    for path in folder.glob("changes.sqlite*"):
        path.unlink()
    with closing(LiveIndex.open(folder)) as anew:
        assert content(anew) == before
        [added] = anew.add(units(730))
        assert added == 43
    with closing(LiveIndex.open(folder)) as reopened:
        assert added in content(reopened)
    with pytest.raises(ArtifactError, match="lacks the changes 1 to 6"):
        publish(folder, "v0001")


def test_ten_thousand_searches_during_twenty_swaps(folder: Path, live: LiveIndex) -> None:
    """Two versions share no id, and queries are alike: an answer with ids of both is a mixed one."""
    build(folder, first_seed=0, first_id=1000)
    live.publish("v0001")
    expected = {0: np.arange(5)[None], 1000: np.arange(1000, 1005)[None]}
    failures: list[BaseException] = []
    counts = [0] * 4
    seen: set[int] = set()
    is_over = threading.Event()
    with closing(LiveIndex.open(folder)) as watching:

        def search(worker: int) -> None:
            index = (live, watching)[worker % 2]
            try:
                while counts[worker] < 2500 or not is_over.is_set():
                    view = index.view()
                    ids = view.search(units(3), SearchParameters(k=40)).ids[0]
                    first_id = 1000 * int(ids[0] >= 1000)
                    assert sorted(ids) == list(range(first_id, first_id + 40)), "a mixed answer"
                    assert ids[0] == first_id + 3
                    assert view.metadata_of(ids[:1]) == [{"key": str(first_id + 3)}]
                    counts[worker] += 1
                    seen.add(first_id)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=search, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for swap in range(20):
            goal = (swap + 1) * 400
            wait_until(lambda goal=goal: sum(counts) >= goal or bool(failures))
            live.publish(("v0002", "v0001")[swap % 2])
        is_over.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert sum(counts) >= 10_000
    assert seen == expected.keys()


# Commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("command", ["check", "describe"])
def test_a_version_that_is_not_there_is_named_beside_those_that_are(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, command, str(folder), "--version", "v0009")
    assert code == 5
    assert "has no version v0009; it has v0001" in error


def test_commands(folder: Path, live: LiveIndex, capsys: pytest.CaptureFixture[str]) -> None:
    change(live)
    code, out, _ = run(capsys, "compact", str(folder), "--json")
    assert (code, json.loads(out)) == (
        0,
        {"index": str(folder), "current": "v0002", "changes": 6, "removed": []},
    )
    live.add(units(740))
    code, out, _ = run(capsys, "versions", str(folder))
    assert out.splitlines() == [
        "  v0001  Flat, 40 vectors of 16 numbers, 7 changes since",
        "* v0002  Flat, 41 vectors of 16 numbers, 1 changes since",
    ]
    code, out, _ = run(capsys, "rollback", str(folder), "--json")
    assert (code, json.loads(out)["current"]) == (0, "v0001")
    assert current_version(folder) == "v0001"
    code, _, error = run(capsys, "rollback", str(folder))
    assert (code, "no version before v0001" in error) == (5, True)
    code, out, _ = run(capsys, "publish", str(folder), "v0002")
    assert (code, current_version(folder)) == (0, "v0002")
    code, _, error = run(capsys, "publish", str(folder), "v0007")
    assert (code, "it has v0001, v0002" in error) == (5, True)
    code, out, _ = run(capsys, "compact", str(folder), "--keep", "1", "--json")
    assert json.loads(out)["removed"] == ["v0001", "v0002"]
    code, out, _ = run(capsys, "versions", str(folder), "--json")
    assert [row["version"] for row in json.loads(out)["versions"]] == ["v0003"]
