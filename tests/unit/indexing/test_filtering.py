import math
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.searching.filtering import matching_rows
from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf, parse_filter

ROWS = [
    {"name": "cat", "width": 200, "share": 0.5, "is_new": True},
    {"name": "dog", "width": 2**53 + 1, "share": 1.0, "is_new": False},
    {"name": "", "width": -3, "share": math.inf, "is_new": None},
    {"name": None, "width": None, "share": None, "is_new": True},
    {"name": "cat", "width": 0, "share": -0.25, "is_new": False},
]
TABLE = pa.concat_tables(  # several chunks, as in a memory-mapped file
    [pa.Table.from_pylist(ROWS[:2]), pa.Table.from_pylist(ROWS[2:], schema=pa.Table.from_pylist(ROWS).schema)]
)


def fits(condition: Filter, row: dict[str, object]) -> bool:
    """The oracle: row by row, in Python."""
    match condition:
        case OneOf(column, values):
            return any(row[column] is None if value is None else row[column] == value for value in values)
        case Between(column, at_least, at_most, above, below):
            value = row[column]
            return (
                value is not None
                and (at_least is None or value >= at_least)
                and (at_most is None or value <= at_most)
                and (above is None or value > above)
                and (below is None or value < below)
            )
        case AllOf(parts):
            return all(fits(part, row) for part in parts)
        case AnyOf(parts):
            return any(fits(part, row) for part in parts)
        case Not(part):
            return not fits(part, row)


numbers = st.sampled_from([-3, 0, 200, 2**53, 2**53 + 1, 2**70, -(2**70), 0.5, -0.25, 199.5, 1e300])
names = st.sampled_from(["cat", "dog", "", "zebra"])


def comparisons(column: str, values):  # type: ignore[no-untyped-def]
    bounds = st.dictionaries(st.sampled_from(["at_least", "at_most", "above", "below"]), values, min_size=1)
    return st.lists(values | st.none(), max_size=3).map(lambda found: {"column": column, "in": found}) | bounds.map(
        lambda found: {"column": column, **found}
    )


trees = st.recursive(
    comparisons("name", names)
    | comparisons("width", numbers)
    | comparisons("share", numbers)
    | st.lists(st.booleans() | st.none(), max_size=2).map(lambda found: {"column": "is_new", "in": found}),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda found: {"all": found})
        | st.lists(inner, min_size=1, max_size=3).map(lambda found: {"any": found})
        | inner.map(lambda found: {"not": found})
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_rows_are_those_that_python_finds_one_by_one(tree: dict[str, object]) -> None:
    condition = parse_filter(tree)
    assert matching_rows(condition, TABLE).tolist() == [fits(condition, row) for row in ROWS]


def test_columns_with_dictionaries_and_times_of_small_integers() -> None:
    table = pa.table(
        {
            "name": pa.array(["a", "b", None, "a"]).dictionary_encode(),
            "small": pa.array([1, 2, None, 255], pa.uint8()),
        }
    )
    assert matching_rows(OneOf("name", ("a", None)), table).tolist() == [True, False, True, True]
    assert matching_rows(OneOf("small", (2, 1000, -1, 1.5)), table).tolist() == [False, True, False, False]
    assert matching_rows(Between("small", above=-7.5, below=300), table).tolist() == [True, True, False, True]
    assert matching_rows(Between("small", at_least=256), table).tolist() == [False] * 4


@pytest.mark.parametrize("kind", [pa.decimal128(9, 2), pa.float16(), pa.float32()])
def test_numbers_of_every_kind_are_compared(kind: pa.DataType) -> None:
    prices = pa.array([0.5, 12.25, None]).cast(pa.float32()).cast(kind)
    table = pa.table({"price": prices})
    assert matching_rows(OneOf("price", (12.25, 7)), table).tolist() == [False, True, False]
    assert matching_rows(Between("price", at_least=0.5, below=12), table).tolist() == [True, False, False]


@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("s"), pa.timestamp("us")])
def test_dates_are_compared_as_they_are_spelled(kind: pa.DataType) -> None:
    days = [datetime(2024, 5, 31), datetime(2024, 6, 1), None, datetime(2025, 1, 1)]
    table = pa.table({"day": pa.array(days).cast(kind)})
    assert matching_rows(Between("day", at_least="2024-06-01"), table).tolist() == [False, True, False, True]
    assert matching_rows(Between("day", below="2024-06"), table).tolist() == [True, False, False, False]
    assert matching_rows(OneOf("day", (None,)), table).tolist() == [False, False, True, False]
    if kind == pa.date32():
        assert matching_rows(OneOf("day", ("2024-06-01",)), table).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (OneOf("colour", ("red",)), r"no column 'colour'; there are name, width, share, is_new"),
        (OneOf("width", ("wide",)), r"column 'width' holds int64, which cannot be compared with 'wide'"),
        (OneOf("width", (True,)), r"'width' holds int64, .* True"),
        (OneOf("name", (7,)), r"'name' holds string, .* 7"),
        (OneOf("is_new", (1,)), r"'is_new' holds bool, .* 1"),
        (Between("is_new", above=0), r"'is_new' holds bool, .* 0"),
        (Between("name", at_least=3), r"'name' holds string, .* 3"),
        (Not(AllOf((OneOf("name", ("a",)), Between("share", below="x")))), r"'share' holds double, .* 'x'"),
    ],
)
def test_a_filter_that_does_not_go_with_the_table_is_refused(condition: Filter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matching_rows(condition, TABLE)


def test_a_table_without_rows_has_no_matching_rows() -> None:
    assert np.array_equal(matching_rows(Not(OneOf("name", ("cat",))), TABLE.slice(0, 0)), np.zeros(0, bool))
