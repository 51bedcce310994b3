"""Filters against metadata: which rows of a table fit."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool
from numpy import ndarray

from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf, Value


def matching_rows(condition: Filter, table: pa.Table) -> Bool[ndarray, "rows"]:
    """For each row of `table` whether it fits.

    A condition either holds or it does not: an empty cell fits `OneOf` only through None, `Between` never, and `Not` of
    a condition exactly where the condition does not hold.

    Raises:
        ValueError: a column is unknown, or its type cannot be compared with the values.
    """
    match condition:
        case OneOf(column, values):
            return _equal_rows(_column(table, column), column, values)
        case Between():
            return _rows_in_range(_column(table, condition.column), condition)
        case AllOf(conditions):
            rows = np.ones(table.num_rows, bool)
            for part in conditions:
                rows &= matching_rows(part, table)
            return rows
        case AnyOf(conditions):
            rows = np.zeros(table.num_rows, bool)
            for part in conditions:
                rows |= matching_rows(part, table)
            return rows
        case Not(part):
            return ~matching_rows(part, table)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise ValueError(f"filter: there is no column {name!r}; there are {', '.join(table.column_names) or 'none'}")
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())  # 2024-05-31, 2024-05-31 18:00:00: text in the order of time
    if pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        return column.cast(pa.float64())
    return column


def _equal_rows(column: pa.ChunkedArray, name: str, values: tuple[Value, ...]) -> Bool[ndarray, "rows"]:
    comparable = [_comparable(value, column.type, name) for value in values if value is not None]
    kept = [value for value in comparable if value is not None]
    rows = np.zeros(len(column), bool)
    if kept:
        rows |= _truth(pc.is_in(column, value_set=pa.array(kept, type=column.type)))
    if None in values:
        rows |= _truth(pc.is_null(column))
    return rows


def _comparable(value: Value, column_type: pa.DataType, name: str) -> Value:
    """The value in the column's type; None where no cell can equal it.

    Raises:
        ValueError: it is of another kind than the column.
    """
    if pa.types.is_boolean(column_type) and isinstance(value, bool):
        return value
    if _is_text(column_type) and isinstance(value, str):
        return value
    if _is_number(value):
        if pa.types.is_floating(column_type):
            return float(value)  # type: ignore[arg-type]
        if pa.types.is_integer(column_type):
            whole = math.isfinite(value) and value == int(value)  # type: ignore[arg-type]
            return int(value) if whole and _fits(int(value), column_type) else None  # type: ignore[arg-type]
    raise _cannot_compare(name, column_type, value)


def _rows_in_range(column: pa.ChunkedArray, condition: Between) -> Bool[ndarray, "rows"]:
    rows = _truth(pc.is_valid(column))
    for bound, compare, round_bound in (
        (condition.at_least, pc.greater_equal, math.ceil),
        (condition.at_most, pc.less_equal, math.floor),
        (condition.above, pc.greater, math.floor),
        (condition.below, pc.less, math.ceil),
    ):
        if bound is None:
            continue
        if pa.types.is_integer(column.type) and _is_number(bound) and math.isfinite(bound):  # type: ignore[arg-type]
            # Whole numbers are compared as such: as floats, those above 2**53 would be rounded.
            whole = round_bound(bound)  # type: ignore[arg-type]
            if not _fits(whole, column.type):
                is_above_all = whole > 0
                if is_above_all == (compare in (pc.greater_equal, pc.greater)):
                    return np.zeros(len(column), bool)
                continue
            scalar = pa.scalar(whole, column.type)
        elif (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)) and _is_number(bound):
            scalar = pa.scalar(float(bound), pa.float64())
        elif _is_text(column.type) and isinstance(bound, str):
            scalar = pa.scalar(bound, column.type)
        else:
            raise _cannot_compare(condition.column, column.type, bound)
        rows &= _truth(compare(column, scalar))
    return rows


def _is_text(column_type: pa.DataType) -> bool:
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: int, integer_type: pa.DataType) -> bool:
    information = np.iinfo(integer_type.to_pandas_dtype())
    return bool(information.min <= value <= information.max)


def _cannot_compare(name: str, column_type: pa.DataType, value: Value) -> ValueError:
    return ValueError(f"filter: column {name!r} holds {column_type}, which cannot be compared with {value!r}")


def _truth(answer: Any) -> Bool[ndarray, "rows"]:
    truth: ndarray = pc.fill_null(answer, False).to_numpy().astype(bool)
    return truth
