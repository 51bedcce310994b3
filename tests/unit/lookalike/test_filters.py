import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.filter_text import parse_filter_text
from lookalike.filters import AllOf, AnyOf, Between, Not, OneOf, parse_filter, to_tree

values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
)
bounds = st.integers() | st.text(max_size=5)
columns = st.text(min_size=1, max_size=9)
leaves = (
    st.fixed_dictionaries({"column": columns, "equals": values})
    | st.fixed_dictionaries({"column": columns, "in": st.lists(values, max_size=4)})
    | st.fixed_dictionaries({"column": columns, "at_least": bounds}, optional={"below": bounds})
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.fixed_dictionaries({"all": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"any": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"not": inner})
    ),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(trees)
def test_a_filter_survives_its_journey_through_json(tree: dict[str, object]) -> None:
    condition = parse_filter(tree)
    assert parse_filter(json.loads(json.dumps(to_tree(condition)))) == condition


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("cat", r"^filter: expected an object .* found 'cat'"),
        ({}, r"^filter: expected column, or one of all, any and not; found nothing"),
        ({"all": []}, r"^filter\.all: expected a list of conditions"),
        ({"all": [{"column": "a", "equals": 1}, {"or": []}]}, r"^filter\.all\[1\]: .* found 'or'"),
        ({"all": [{"column": "a", "equals": 1}], "any": []}, r"found 'all', 'any'"),
        ({"not": {"column": "a"}}, r"^filter\.not: beside column, .* found nothing"),
        ({"column": "a", "equals": [1]}, r"^filter\.equals: .* found list"),
        ({"column": "a", "in": "cat"}, r"^filter\.in: expected a list"),
        ({"column": "a", "in": [1, float("nan")]}, r"^filter\.in\[1\]: .* finite"),
        ({"column": "a", "equals": 10**400}, r"^filter\.equals: .* finite"),
        ({"column": "a", "below": -(10**400)}, r"^filter\.below: .* finite"),
        ({"column": "a", "above": None}, r"^filter\.above: expected a text or a number"),
        ({"column": "a", "at_least": True}, r"^filter\.at_least: expected a text or a number"),
        ({"column": "a", "equals": 1, "in": [2]}, r"found 'equals', 'in'"),
        ({"column": 7, "equals": 1}, r"^filter\.column: expected the name of a column, found 7"),
        ({"column": "a", "equals": "x" * 1001}, r"at most 1000 characters"),
        ({"column": "a", "in": list(range(10_001))}, r"at most 10000 values"),
        ({"any": [{"column": "a", "equals": 1}] * 300}, r"at most 256 conditions"),
    ],
)
def test_what_is_wrong_with_a_tree_is_said_with_its_place(tree: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_filter(tree)


def test_a_deep_tree_ends_in_an_error() -> None:
    tree: object = {"column": "a", "equals": 1}
    for _ in range(5000):
        tree = {"not": tree}
    with pytest.raises(ValueError, match="nested at most 16 deep"):
        parse_filter(tree)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("class_name = cat", OneOf("class_name", ("cat",))),
        ("class_name==cat", OneOf("class_name", ("cat",))),
        ('"a name" = "two words"', OneOf("a name", ("two words",))),
        (r"a = 'it\'s'", OneOf("a", ("it's",))),
        ("width >= 200", Between("width", at_least=200)),
        ("width<1.5e2", Between("width", below=150.0)),
        ("label = -3", OneOf("label", (-3,))),
        ('label = "3"', OneOf("label", ("3",))),
        ("label = null", OneOf("label", (None,))),
        ("is_new = true", OneOf("is_new", (True,))),
        ("label in (NULL, True)", OneOf("label", (None, True))),
        ("split in (train, val)", OneOf("split", ("train", "val"))),
        ("split not in (train)", Not(OneOf("split", ("train",)))),
        ("split != train", Not(OneOf("split", ("train",)))),
        ("a=1 and b=2 or c=3", AnyOf((AllOf((OneOf("a", (1,)), OneOf("b", (2,)))), OneOf("c", (3,))))),
        ("a=1 AND (b=2 or c=3)", AllOf((OneOf("a", (1,)), AnyOf((OneOf("b", (2,)), OneOf("c", (3,))))))),
        ("not a=1 and b=2", AllOf((Not(OneOf("a", (1,))), OneOf("b", (2,))))),
        ("not not (a=1)", Not(Not(OneOf("a", (1,))))),
        ("key = shoes/0041.jpg", OneOf("key", ("shoes/0041.jpg",))),
    ],
)
def test_typed_filters(text: str, condition: object) -> None:
    assert parse_filter_text(text) == condition


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a column, found the end"),
        ("a", "expected =, .* found the end"),
        ("a = ", "expected a value, found the end"),
        ("a = 1 b = 2", "expected and, or, or the end, found 'b' at character 7"),
        ("(a = 1", r"expected \), found the end"),
        ("a in ()", r"expected a value, found '\)' at character 7"),
        ("a not 3", "expected in, found '3'"),
        ("a > null", "a > needs a number or a text"),
        ("a = 'open", 'cannot read this, found "\'" at character 5'),
        ("a ! 3", "cannot read this, found '!' at character 3"),
        ("not " * 100 + "a = 1", "at most 50 levels"),
        ("(" * 100, "at most 50 levels"),
        ("a" * 10_001, "at most 10000 characters"),
    ],
)
def test_what_is_wrong_with_a_typed_filter_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_filter_text(text)
