"""Conditions on metadata: which pictures a search may find. Part of the API, of settings and of the command line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

# A filter may come from anybody: what it may cost is bounded.
MOST_LEVELS = 16
MOST_CONDITIONS = 256
MOST_VALUES = 10_000
MOST_CHARACTERS = 1000  # of a column's name or a value

Value = str | int | float | bool | None

# Beyond every column's range, but a whole number of this size still becomes a float.
_LARGEST_INTEGER = 10**308

_BOUNDS = ("at_least", "at_most", "above", "below")


@dataclass(frozen=True, slots=True)
class OneOf:
    """The column holds one of `values`; None stands for an empty cell."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Between:
    """The column's value lies in a range; a bound that is None is open. Empty cells never do."""

    column: str
    at_least: str | int | float | None = None
    at_most: str | int | float | None = None
    above: str | int | float | None = None
    below: str | int | float | None = None


@dataclass(frozen=True, slots=True)
class AllOf:
    conditions: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    conditions: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Not:
    condition: "Filter"


Filter = Union[OneOf, Between, AllOf, AnyOf, Not]  # noqa: UP007 - a string in a union of types needs this form


def parse_filter(tree: object) -> Filter:
    """A filter from its JSON form.

    `{"column": "class_name", "equals": "cat"}`, `{"column": "class_name", "in": ["cat", "dog"]}`,
    `{"column": "width", "at_least": 200, "below": 300}` (also `at_most` and `above`), `{"all": [...]}`,
    `{"any": [...]}`, `{"not": {...}}`; `null` as a value stands for an empty cell.

    Raises:
        ValueError: the tree is not of this form, or too large; the message says where in the tree.
    """
    return _TreeReader().read(tree, where="filter", level=1)


def to_tree(condition: Filter) -> dict[str, Any]:
    """The JSON form; `parse_filter` is the inverse."""
    match condition:
        case OneOf(column, values):
            return {"column": column, "in": list(values)}
        case Between():
            bounds = {name: getattr(condition, name) for name in _BOUNDS}
            return {"column": condition.column, **{name: bound for name, bound in bounds.items() if bound is not None}}
        case AllOf(conditions):
            return {"all": [to_tree(part) for part in conditions]}
        case AnyOf(conditions):
            return {"any": [to_tree(part) for part in conditions]}
        case Not(part):
            return {"not": to_tree(part)}


class _TreeReader:
    """Counts what it has read, so that a hostile tree ends in an error and not in an overflow."""

    def __init__(self) -> None:
        self._num_conditions = 0

    def read(self, tree: object, *, where: str, level: int) -> Filter:
        self._num_conditions += 1
        if self._num_conditions > MOST_CONDITIONS:
            raise ValueError(f"{where}: a filter may hold at most {MOST_CONDITIONS} conditions")
        if level > MOST_LEVELS:
            raise ValueError(f"{where}: conditions may be nested at most {MOST_LEVELS} deep")
        if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
            raise ValueError(f"{where}: expected an object with column, all, any or not, found {_named(tree)}")
        if "column" in tree:
            return _read_comparison(tree, where=where)
        if len(tree) != 1 or not tree.keys() <= {"all", "any", "not"}:
            found = ", ".join(_named(key) for key in list(tree)[:5]) or "nothing"
            raise ValueError(f"{where}: expected column, or one of all, any and not; found {found}")
        [(word, inner)] = tree.items()
        if word == "not":
            return Not(self.read(inner, where=f"{where}.not", level=level + 1))
        if not isinstance(inner, list) or not inner:
            raise ValueError(f"{where}.{word}: expected a list of conditions, found {_named(inner)}")
        parts = tuple(
            self.read(part, where=f"{where}.{word}[{place}]", level=level + 1) for place, part in enumerate(inner)
        )
        return AllOf(parts) if word == "all" else AnyOf(parts)


def _read_comparison(tree: Mapping[str, Any], *, where: str) -> Filter:
    column, words = tree["column"], set(tree) - {"column"}
    if not isinstance(column, str) or not 0 < len(column) <= MOST_CHARACTERS:
        raise ValueError(f"{where}.column: expected the name of a column, found {_named(column)}")
    if words == {"equals"}:
        return OneOf(column, (_read_value(tree["equals"], where=f"{where}.equals"),))
    if words == {"in"}:
        values = tree["in"]
        if not isinstance(values, list):
            raise ValueError(f"{where}.in: expected a list of values, found {_named(values)}")
        if len(values) > MOST_VALUES:
            raise ValueError(f"{where}.in: at most {MOST_VALUES} values, found {len(values)}")
        return OneOf(column, tuple(_read_value(value, where=f"{where}.in[{i}]") for i, value in enumerate(values)))
    if words and words <= set(_BOUNDS):
        return Between(column, **{word: _read_bound(tree[word], where=f"{where}.{word}") for word in words})
    found = ", ".join(_named(word) for word in sorted(words)[:5]) or "nothing"
    raise ValueError(f"{where}: beside column, expected equals, in, or some of {', '.join(_BOUNDS)}; found {found}")


def _read_value(value: object, *, where: str) -> Value:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise ValueError(f"{where}: at most {MOST_CHARACTERS} characters, found {len(value)}")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and abs(value) < _LARGEST_INTEGER:
        return value
    raise ValueError(f"{where}: expected a text, a finite number, true, false or null, found {_named(value)}")


def _read_bound(value: object, *, where: str) -> str | int | float:
    bound = _read_value(value, where=where)
    if bound is None or isinstance(bound, bool):
        raise ValueError(f"{where}: expected a text or a number, found {_named(value)}")
    return bound


def _named(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
