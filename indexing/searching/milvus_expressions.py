"""Filters and id selections as Milvus boolean expressions.

Milvus drops a row whose condition is neither true nor false because a cell is empty, and `not` keeps it so; here a
filter that does not hold is false, and `Not` of it is true. Hence `Not` is pushed down to the single conditions, and
each of those says what becomes of an empty cell.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf, Value
from lookalike.id_selection import IdSelection

ID_FIELD = "id"
NOTHING = f"{ID_FIELD} < 0"  # ids are not negative
EVERYTHING = f"{ID_FIELD} >= 0"
# An id takes up to 20 characters: 4 MB of text, which a server parses in seconds and its message limits let through.
MAX_LISTED_IDS = 200_000
INT64 = range(-(2**63), 2**63)

ColumnKind = Literal["text", "integer", "number", "truth"]
IN_WORDS: dict[ColumnKind, str] = {
    "text": "text",
    "integer": "whole numbers",
    "number": "numbers",
    "truth": "true or false",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of metadata and where Milvus keeps it."""

    name: str
    field: str  # an identifier of Milvus's expressions
    kind: ColumnKind


def expression_of(condition: Filter, columns: Mapping[str, Column]) -> str:
    """The expression that holds for exactly the rows that fit.

    Raises:
        ValueError: an unknown column, or a value that a column of its kind cannot be compared with.
    """
    return _expression(condition, columns, is_negated=False)


def selection_expression(selection: IdSelection) -> str:
    """Raises ValueError where more ids are listed than an expression should hold."""
    if len(selection.ids) > MAX_LISTED_IDS:
        raise ValueError(
            f"a selection of {len(selection.ids):,} ids is too long for a search in Milvus (at most "
            f"{MAX_LISTED_IDS:,}). Give the pictures a column of metadata, and filter by it."
        )
    if not len(selection.ids):
        return EVERYTHING if selection.excludes else NOTHING
    return f"{ID_FIELD} {'not in' if selection.excludes else 'in'} [{', '.join(map(str, selection.ids.tolist()))}]"


def both(first: str, second: str) -> str:
    """The conjunction; an empty expression is none."""
    return f"({first}) and ({second})" if first and second else first or second


def _expression(condition: Filter, columns: Mapping[str, Column], *, is_negated: bool) -> str:
    if isinstance(condition, Not):
        return _expression(condition.condition, columns, is_negated=not is_negated)
    if isinstance(condition, AllOf | AnyOf):
        is_conjunction = isinstance(condition, AllOf) != is_negated
        parts = [_expression(part, columns, is_negated=is_negated) for part in condition.conditions]
        if not parts:
            return EVERYTHING if is_conjunction else NOTHING
        return (" and " if is_conjunction else " or ").join(f"({part})" for part in parts)
    column = columns.get(condition.column)
    if column is None:
        raise ValueError(
            f"the metadata have no column {condition.column!r}; the columns are {', '.join(sorted(columns))}."
        )
    return (
        _one_of(condition, column, is_negated)
        if isinstance(condition, OneOf)
        else _between(condition, column, is_negated)
    )


def _one_of(condition: OneOf, column: Column, is_negated: bool) -> str:
    literals = [_equal_literal(value, column) for value in condition.values if value is not None]
    possible = [literal for literal in literals if literal is not None]
    finds_empty, is_listed, is_other = None in condition.values, "", ""
    if possible:
        is_listed = f"{column.field} in [{', '.join(possible)}]"
        is_other = f"{column.field} not in [{', '.join(possible)}]"
    if is_negated:
        if finds_empty:
            return both(f"{column.field} is not null", is_other)
        return f"{column.field} is null or {is_other}" if is_other else EVERYTHING
    parts = [is_listed] * bool(is_listed) + [f"{column.field} is null"] * finds_empty
    return " or ".join(parts) or NOTHING


def _between(condition: Between, column: Column, is_negated: bool) -> str:
    """Each bound is one comparison; negated, an empty cell will do, or any bound that is not kept."""
    bounds = (
        (condition.at_least, ">=", "<"),
        (condition.above, ">", "<="),
        (condition.at_most, "<=", ">"),
        (condition.below, "<", ">="),
    )
    if is_negated:
        broken = [_comparison(column, opposite, bound) for bound, _, opposite in bounds if bound is not None]
        return " or ".join([f"{column.field} is null", *broken])
    kept = [_comparison(column, operator, bound) for bound, operator, _ in bounds if bound is not None]
    return " and ".join([f"{column.field} is not null", *kept])


def _comparison(column: Column, operator: str, bound: str | int | float) -> str:
    if column.kind == "text" and isinstance(bound, str):
        return f"{column.field} {operator} {quoted(bound)}"
    if column.kind not in ("integer", "number") or isinstance(bound, str | bool):
        raise _misfit(bound, column)
    if math.isnan(bound):
        raise ValueError(f"column {column.name}: a bound is NaN.")
    largest = INT64.stop - 1 if column.kind == "integer" else sys.float_info.max
    if abs(bound) > largest:  # beyond every cell: cells are finite
        return EVERYTHING if (bound > 0) == (operator in ("<", "<=")) else NOTHING
    if column.kind == "number":
        return f"{column.field} {operator} {float(bound)!r}"
    # Between two whole numbers: 1.5 bounds from below as 2 does with >=, and as 1 does with >.
    return f"{column.field} {operator} {math.ceil(bound) if operator in ('>=', '<') else math.floor(bound)}"


def _equal_literal(value: Value, column: Column) -> str | None:
    """None where no value of the column can equal it."""
    if column.kind == "text" and isinstance(value, str):
        return quoted(value)
    if column.kind == "truth" and isinstance(value, bool):
        return "true" if value else "false"
    if column.kind in ("integer", "number") and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # NaN, too
            return None
        if column.kind == "number":
            return repr(float(value))
        return str(int(value)) if int(value) == value and int(value) in INT64 else None
    raise _misfit(value, column)


def _misfit(value: object, column: Column) -> ValueError:
    return ValueError(f"column {column.name} holds {IN_WORDS[column.kind]}, which {value!r} cannot be compared with.")


def quoted(text: str) -> str:
    """A string literal; every other character stands for itself."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f'"{text}"'
