"""A live index answers as a dictionary of its pictures would, from the moment a change returns, in every process."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy import ndarray

from indexing.building.build import build_index
from indexing.living.journal import JournalTransaction, StoredPicture
from indexing.living.live_index import LiveIndex
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from lookalike.errors import ResourceError
from lookalike.filters import Between, OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import Effort, SearchParameters

DIM = 16
NUM_VECTORS = 60


def unit(seed: int) -> ndarray:
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def units(*seeds: int) -> ndarray:
    return np.stack([unit(seed) for seed in seeds])


def write_base(folder: Path, *, first_seed: int = 0, index_type: str = "Flat", half: bool = False) -> None:
    """Ids 0, 10, 20, ...; the vector of id 10 * n is `unit(first_seed + n)`."""
    folder.mkdir(exist_ok=True)
    source_folder = folder.with_name(f"{folder.name}-source-{first_seed}")
    source_folder.mkdir(exist_ok=True)
    vectors = units(*range(first_seed, first_seed + NUM_VECTORS))
    np.save(source_folder / "vectors.npy", vectors.astype(np.float16) if half else vectors)
    np.save(source_folder / "ids.npy", 10 * np.arange(NUM_VECTORS))
    table = pa.table({"key": [f"old{n}" for n in range(NUM_VECTORS)], "label": [n % 4 for n in range(NUM_VECTORS)]})
    pq.write_table(table, source_folder / "metadata.parquet")
    source = ArraySource(*(source_folder / name for name in ("vectors.npy", "ids.npy", "metadata.parquet")))
    build_index(source, folder, IndexSettings(type=index_type, num_measured_queries=10))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "index"
    write_base(folder)
    return folder


def nearest(live: LiveIndex, vector: ndarray, **parameters: object) -> list[int]:
    hits = live.search(vector[None], SearchParameters(**{"k": 3, **parameters}))  # type: ignore[arg-type]
    return [int(i) for i in hits.ids[0]]


def test_a_live_index_without_changes_is_its_version(live: LiveIndex) -> None:
    base = live.view().base
    queries = units(500, 501, 502)
    for k in (1, 7, 100):
        found, expected = live.search(queries, SearchParameters(k=k)), base.search(queries, SearchParameters(k=k))
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert (live.num_vectors, live.dim, live.num_changes) == (NUM_VECTORS, DIM, 0)
    assert not live.journal.path.exists()


def test_the_next_search_finds_an_addition_and_not_what_was_deleted(live: LiveIndex) -> None:
    [added] = live.add(units(700))
    assert added == 591
    assert nearest(live, unit(700))[0] == added
    assert nearest(live, unit(3))[0] == 30
    live.delete([30])
    assert 30 not in nearest(live, unit(3), k=100)
    live.replace([40], units(701))
    assert nearest(live, unit(701))[0] == 40
    hits = live.search(units(4), SearchParameters(k=NUM_VECTORS))
    np.testing.assert_allclose(hits.scores[0][hits.ids[0] == 40], unit(4) @ unit(701), atol=1e-6)
    live.delete([added])
    assert added not in nearest(live, unit(700), k=100)
    assert live.num_vectors == NUM_VECTORS - 1
    assert live.num_changes == 4
    assert live.ids().tolist() == [i for i in range(0, 600, 10) if i != 30]


def test_a_deletion_counts_though_the_journal_cannot_be_read_after_it(
    live: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = live.journal.writing

    def fail() -> int:
        raise ResourceError("the journal cannot be used: too many open files")

    @contextmanager
    def unreadable_after() -> Iterator[JournalTransaction]:
        with writing() as transaction:
            yield transaction
        monkeypatch.setattr(live.journal, "stamp", fail)

    monkeypatch.setattr(live.journal, "writing", unreadable_after)
    live.delete([30])
    monkeypatch.undo()
    assert 30 not in nearest(live, unit(3), k=100)
    assert live.num_changes == 1


def test_a_row_is_made_of_that_which_it_replaces(live: LiveIndex) -> None:
    def row(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "label": old["label"] + 100}

    live.put(units(700, 701), [row, {"key": "given"}], ids=[40, 20], replaces=True)
    assert live.metadata_of(np.array([40, 20])) == [{"key": "old4", "label": 100}, {"key": "given", "label": None}]


def test_ties_are_ordered_by_id_across_base_and_additions(live: LiveIndex) -> None:
    live.add(units(5, 5, 5), ids=[7, 51, 999])
    hits = live.search(units(5), SearchParameters(k=4))
    assert hits.ids[0].tolist() == [7, 50, 51, 999]
    assert len(set(hits.scores[0].tolist())) == 1


def test_k_above_the_size_pads(live: LiveIndex) -> None:
    live.add(units(700, 701))
    live.delete([0, 10, 20])
    hits = live.search(units(1), SearchParameters(k=100))
    assert sorted(hits.ids[0][:59].tolist()) == live.ids().tolist()
    assert (hits.ids[0][59:] == -1).all()
    assert np.isneginf(hits.scores[0][59:]).all()


def test_an_index_of_which_everything_was_deleted_is_empty(live: LiveIndex) -> None:
    live.delete(live.ids())
    assert live.num_vectors == 0
    assert nearest(live, unit(1)) == [-1, -1, -1]
    [first] = live.add(units(1))
    assert first == 591
    assert nearest(live, unit(1)) == [first, -1, -1]


def test_vectors_and_metadata_come_from_both_parts(live: LiveIndex) -> None:
    ids = live.add(units(700, 701), [{"key": "new", "label": 9}, {"label": 8}])
    live.replace([20], units(702), [{"key": "changed"}])
    asked = np.array([ids[1], 0, 20, ids[0], 590])
    np.testing.assert_array_equal(live.vectors_of(asked), units(701, 0, 702, 700, 59))
    assert live.metadata_of(asked) == [
        {"key": str(ids[1]), "label": 8},
        {"key": "old0", "label": 0},
        {"key": "changed", "label": None},
        {"key": "new", "label": 9},
        {"key": "old59", "label": 3},
    ]
    live.delete([20, int(ids[0])])
    for look_up in (live.vectors_of, live.metadata_of):
        for missing in (20, int(ids[0]), 5, -1):
            with pytest.raises(KeyError, match=str(missing)):
                look_up(np.array([0, missing]))


def test_filters_and_selections_hold_in_both_parts(live: LiveIndex) -> None:
    live.add(units(*range(700, 720)), [{"label": n % 4} for n in range(20)], ids=list(range(1000, 1020)))
    live.replace([0], units(0), [{"label": 2}])
    live.delete([40, 1001])
    labels = {10 * n: n % 4 for n in range(NUM_VECTORS)} | {1000 + n: n % 4 for n in range(20)} | {0: 2}
    kept = {i: label for i, label in labels.items() if i not in (40, 1001)}
    condition = OneOf("label", (1,))
    found = nearest(live, unit(5), k=200, filter=condition)
    assert sorted(i for i in found if i >= 0) == sorted(i for i, label in kept.items() if label == 1)
    among = IdSelection.only([0, 20, 40, 1001, 1002, 1003, 77])
    found = nearest(live, unit(5), k=10, among=among)
    assert sorted(i for i in found if i >= 0) == [0, 20, 1002, 1003]
    found = nearest(live, unit(5), k=200, filter=Between("label", at_least=2, at_most=2), among=among)
    assert sorted(i for i in found if i >= 0) == [0, 20, 1002]
    with pytest.raises(ValueError, match="colour"):
        live.search(units(1), SearchParameters(filter=OneOf("colour", ("red",))))


def test_wishes_for_effort_and_recall_reach_a_partitioned_version(tmp_path: Path) -> None:
    write_base(tmp_path / "index", index_type="IVF4,Flat")
    with closing(LiveIndex.open(tmp_path / "index")) as live:
        live.add(units(*range(700, 705)), ids=list(range(1000, 1005)))
        live.delete([30])
        everything = units(*range(NUM_VECTORS), *range(700, 705))
        ids = np.array([*range(0, 600, 10), *range(1000, 1005)])
        query = unit(900)
        exact = [int(i) for i in ids[np.argsort(-(everything @ query), kind="stable")] if i != 30][:5]
        assert nearest(live, query, k=5, exact=True) == exact
        assert nearest(live, query, k=5, effort=Effort(num_probes=4, candidates_per_hit=4)) == exact
        assert 30 not in nearest(live, unit(3), k=70, effort=Effort(num_probes=4))
        for recall in (0.5, 1.0):
            assert nearest(live, unit(702), k=1, recall=recall) == [1002]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda live: live.add(units(1), ids=[30]), ValueError, "id 30 is in use"),
        (lambda live: live.add(units(1, 2), ids=[31, 31]), ValueError, "31 is given more than once"),
        (lambda live: live.add(units(1), ids=[-1]), ValueError, "id -1 is not between"),
        (lambda live: live.add(units(1), ids=[2**63 - 1]), ValueError, "is not between"),
        (lambda live: live.add(units(1)[:, :8]), ValueError, "have length 16"),
        (lambda live: live.add(np.full((1, DIM), np.nan, np.float32)), ValueError, "finite and of unit length"),
        (lambda live: live.add(2 * units(1)), ValueError, "unit length, that of row 0 has length 2"),
        (lambda live: live.add(units(1), [{"colour": "red"}]), ValueError, "no column 'colour'.*key, label"),
        (lambda live: live.add(units(1), [{"label": "red"}]), ValueError, "'label'"),
        (lambda live: live.add(units(1), [{"label": np.int64(3)}]), ValueError, "JSON values.*int64"),
        (lambda live: live.add(units(1), [{}, {}]), ValueError, "1 ids, 1 vectors, 2 metadata rows"),
        (lambda live: live.add(units(1), ids=[1, 2]), ValueError, "2 ids, 1 vectors"),
        (lambda live: live.replace([31], units(1)), KeyError, "31"),
        (lambda live: live.delete([30, 31]), KeyError, "31"),
        (lambda live: live.delete([30, 30]), ValueError, "30 is given more than once"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    live: LiveIndex, change: Callable[[LiveIndex], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        change(live)
    assert live.num_changes == 0
    assert live.ids().tolist() == list(range(0, 600, 10))
    assert live.add(units(1)).tolist() == [591]  # and no id was used up


def test_a_deleted_id_may_be_given_again_but_is_never_assigned_again(live: LiveIndex) -> None:
    [first] = live.add(units(700))
    live.delete([first, 590])
    [second] = live.add(units(701))
    assert second == first + 1
    live.add(units(702), ids=[590])
    assert nearest(live, unit(702))[0] == 590


def test_half_precision_versions_round_additions_at_once(tmp_path: Path) -> None:
    write_base(tmp_path / "index", half=True)
    with closing(LiveIndex.open(tmp_path / "index")) as live:
        stored = live.view().base.store.vectors.dtype
        ids = live.add(units(700))
        np.testing.assert_array_equal(live.vectors_of(ids), units(700).astype(stored).astype(np.float32))
        before = live.search(units(1, 700), SearchParameters(k=70))
        live.compact()
        after = live.search(units(1, 700), SearchParameters(k=70))
        np.testing.assert_array_equal(before.ids, after.ids)
        np.testing.assert_array_equal(before.scores, after.scores)


def test_a_reopened_index_is_as_it_was(folder: Path, live: LiveIndex) -> None:
    live.add(units(700, 701), [{"label": 5}, {"label": 6}])
    live.delete([0, 591])
    live.replace([10], units(702))
    with closing(LiveIndex.open(folder)) as reopened:
        assert reopened.ids().tolist() == live.ids().tolist()
        np.testing.assert_array_equal(reopened.vectors_of(live.ids()), live.vectors_of(live.ids()))
        assert reopened.metadata_of(live.ids()) == live.metadata_of(live.ids())


def test_another_opener_sees_a_change_in_its_next_search(folder: Path, live: LiveIndex) -> None:
    with closing(LiveIndex.open(folder)) as other:
        for seed in range(700, 710):
            [identifier] = live.add(units(seed))
            assert nearest(other, unit(seed))[0] == identifier
            other.delete([identifier])
            assert nearest(live, unit(seed))[0] != identifier


def test_a_view_stays_as_it_was(live: LiveIndex) -> None:
    view = live.view()
    live.add(units(700))
    live.delete([0])
    assert view.ids().tolist() == list(range(0, 600, 10))
    assert 591 not in view.search(units(700), SearchParameters(k=60)).ids
    assert view.metadata_of(np.array([0])) == [{"key": "old0", "label": 0}]


def test_pictures_are_kept_for_who_serves_them(live: LiveIndex) -> None:
    live.add(units(700, 701), pictures=[StoredPicture(b"jpeg", None), None], ids=[1000, 1001])
    assert live.journal.picture_of(1000) == StoredPicture(b"jpeg", None)
    assert live.journal.picture_of(1001) is None
    live.compact()
    assert live.journal.picture_of(1000) == StoredPicture(b"jpeg", None)
    live.replace([1000], units(702))
    assert live.journal.picture_of(1000) is None


def test_a_locked_journal_refuses_changes_while_searches_go_on(folder: Path, live: LiveIndex) -> None:
    with closing(LiveIndex.open(folder, lock_seconds=0.1)) as other, live.journal.writing():
        with pytest.raises(ResourceError, match="is locked"):
            other.add(units(700))
        assert nearest(other, unit(3))[0] == 30
    assert live.num_changes == 0


_CHANGES_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from indexing.living.live_index import LiveIndex
live = LiveIndex.open(Path(sys.argv[1]))
for step in range(10_000):
    vector = np.random.default_rng(10_000 + step).normal(size=(1, 16)).astype(np.float32)
    [added] = live.add(vector / np.linalg.norm(vector), [{"label": step}])
    print("added", added, step, flush=True)
    if step % 4 == 3:
        live.delete([added - 1])
        print("deleted", added - 1, step, flush=True)
"""


def test_killed_right_after_an_acknowledgement_nothing_is_lost(folder: Path) -> None:
    command = [sys.executable, "-c", _CHANGES_FOREVER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    expected: dict[int, int] = {}
    with process.stdout as lines:
        for number, line in enumerate(lines):
            if number == 30:
                process.kill()
            if not line.endswith("\n"):
                break
            what, identifier, step = line.split()
            if what == "added":
                expected[int(identifier)] = int(step)
            else:
                del expected[int(identifier)]
    process.wait()
    assert len(expected) >= 15
    with closing(LiveIndex.open(folder)) as live:
        found = {int(i): live.metadata_of(np.array([i]))[0]["label"] for i in live.ids() if i > 590}
        unacknowledged = found.keys() ^ expected.keys()
        assert len(unacknowledged) <= 1  # the one change that was under way
        assert all(found[i] == step for i, step in expected.items() if i in found)
        # Of the acknowledged, a missing one can only be the deletion that was under way.
        assert all(i in found or expected[i] % 4 == 2 for i in expected)
        for identifier, step in expected.items():
            if identifier in found:
                assert nearest(live, unit(10_000 + step))[0] == identifier
