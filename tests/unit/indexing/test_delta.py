"""A delta answers as a dictionary of the changes would, and never changes once it is there."""

import numpy as np
import pyarrow as pa
import pytest
from numpy import ndarray

from indexing.living.delta import Delta, is_among, metadata_table
from indexing.living.journal import Change
from indexing.vector_store import VectorStore
from lookalike.filters import Between, OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import SearchParameters

DIM = 8
SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int64())])


def unit(seed: int) -> ndarray:
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def put(sequence: int, identifier: int, seed: int | None = None, **metadata: object) -> Change:
    return Change(sequence, identifier, unit(sequence if seed is None else seed), metadata, None)


def gone(sequence: int, identifier: int) -> Change:
    return Change(sequence, identifier, None, {}, None)


def base(*ids: int) -> VectorStore:
    return VectorStore(np.stack([unit(1000 + i) for i in ids]), np.array(ids, np.int64))


@pytest.fixture
def empty() -> Delta:
    return Delta(base(0, 1, 2, 10, 20), SCHEMA)


def test_random_changes_equal_a_dictionary(empty: Delta) -> None:
    random = np.random.default_rng(0)
    delta, oracle, hidden = empty, {}, set()
    for start in range(0, 3000, 20):
        changes: list[Change] = []
        for sequence in range(start, start + 20):
            identifier = int(random.integers(40))
            change = gone(sequence, identifier) if random.random() < 0.4 else put(sequence, identifier, label=sequence)
            changes.append(change)
            oracle.pop(identifier, None)
            if change.vector is not None:
                oracle[identifier] = change
            if identifier in (0, 1, 2, 10, 20):
                hidden.add(identifier)
        delta = delta.after(changes)
        assert delta.ids.tolist() == sorted(oracle)
        assert delta.hidden.tolist() == sorted(hidden)
    np.testing.assert_array_equal(delta.store.vectors, np.stack([oracle[i].vector for i in sorted(oracle)]))
    assert delta.metadata.column("label").to_pylist() == [oracle[i].metadata["label"] for i in sorted(oracle)]
    # Slots of what was replaced and deleted were given back.
    assert delta._slots.used < 1100


def test_an_earlier_delta_stays_as_it_was(empty: Delta) -> None:
    first = empty.after([put(1, 30, label=1), put(2, 5, label=2)])
    second = first.after([put(3, 5, label=3), gone(4, 30), put(5, 40), gone(6, 1)])
    assert (empty.ids.tolist(), first.ids.tolist(), second.ids.tolist()) == ([], [5, 30], [5, 40])
    np.testing.assert_array_equal(first.store.vectors, np.stack([unit(2), unit(1)]))
    assert first.metadata.to_pylist() == [{"key": None, "label": 2}, {"key": None, "label": 1}]
    assert (first.hidden.tolist(), second.hidden.tolist()) == ([], [1])


def test_additions_one_by_one_are_copied_a_few_times_each(empty: Delta) -> None:
    delta, copies = empty, 0
    for count in range(1, 501):
        before = delta._slots._vectors
        delta = delta.after([put(count, 100 + count)])
        copies += delta._slots._vectors is not before
        assert np.shares_memory(delta.store.vectors, delta._slots._vectors)  # as long as ids ascend
        assert len(delta._slots._tables) <= count.bit_length()
    assert copies <= 4


def test_search_is_exact_and_respects_filter_and_selection(empty: Delta) -> None:
    delta = empty.after([put(i, i, label=i % 5, key=str(i)) for i in range(100, 200)])
    query = unit(7)[None]
    order = sorted(range(100, 200), key=lambda i: (-float(unit(i) @ query[0]), i))
    assert delta.search(query, SearchParameters(k=7)).ids[0].tolist() == order[:7]
    labelled = [i for i in order if i % 5 in (1, 2)]
    by_filter = SearchParameters(k=7, filter=OneOf("label", (1, 2)))
    assert delta.search(query, by_filter).ids[0].tolist() == labelled[:7]
    among = IdSelection.all_but(labelled[:3])
    both = SearchParameters(k=7, filter=Between("label", at_least=1, at_most=2), among=among)
    assert delta.search(query, both).ids[0].tolist() == labelled[3:10]
    few = delta.search(query, SearchParameters(k=3, among=IdSelection.only([150, 7])))
    assert few.ids[0].tolist() == [150, -1, -1]
    # With what was put in between, bounds of all that ever was there still hold.
    fewer = delta.after([gone(1000 + i, i) for i in range(100, 190)])
    assert fewer.search(query, SearchParameters(k=10)).ids[0].tolist() == [i for i in order if i >= 190]
    with pytest.raises(ValueError, match="no column 'colour'"):
        delta.search(query, SearchParameters(filter=OneOf("colour", ("red",))))


def test_what_the_base_may_find(empty: Delta) -> None:
    assert empty.visible_in_base(None) is None
    chosen = IdSelection.only([1, 2])
    assert empty.visible_in_base(chosen) is chosen
    delta = empty.after([gone(1, 2), put(2, 10), put(3, 77), gone(4, 78)])
    visible = delta.visible_in_base(None)
    assert visible is not None
    assert (visible.ids.tolist(), visible.excludes) == ([2, 10], True)
    narrowed = delta.visible_in_base(chosen)
    assert narrowed is not None
    assert narrowed.contains(np.array([1, 2])).tolist() == [True, False]
    assert delta.base_holds(np.array([2, 1, 10, 77])).tolist() == [False, True, False, False]
    assert delta.holds(np.array([2, 1, 10, 77])).tolist() == [False, False, True, True]


def test_is_among_equals_isin() -> None:
    random = np.random.default_rng(1)
    for size in (0, 1, 30):
        ascending = np.unique(random.integers(0, 50, size))
        ids = random.integers(-5, 60, 100)
        np.testing.assert_array_equal(is_among(ids, ascending), np.isin(ids, ascending))


def test_metadata_takes_the_types_of_the_index() -> None:
    schema = pa.schema(
        [("key", pa.string()), ("label", pa.int32()), ("taken", pa.timestamp("s")), ("shop", pa.bool_())]
    )
    table = metadata_table([{"taken": "2026-01-02T03:04:05", "shop": True}, {"key": "b", "label": 5}], schema)
    assert table.schema == schema
    assert table.column("label").to_pylist() == [None, 5]
    assert table.column("taken").to_pylist()[0].isoformat() == "2026-01-02T03:04:05"
    # What cannot be spelled may still be left out.
    with_tags = metadata_table([{"key": "a"}], schema.append(pa.field("tags", pa.list_(pa.string()))))
    assert with_tags.column("tags").to_pylist() == [None]
    for row, message in (
        ({"colour": "red"}, "no column 'colour'; the columns of this index are: key, label"),
        ({"label": "x"}, "'label' holds values of type int32"),
        ({"label": 2**40}, "'label' holds values of type int32"),
        ({"key": 3}, "'key' holds values of type string"),
        ({"taken": "yesterday"}, "'taken'"),
    ):
        with pytest.raises(ValueError, match=message):
            metadata_table([row], schema)
