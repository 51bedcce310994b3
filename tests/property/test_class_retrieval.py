"""Whatever the pictures: order, scale and division of the work change nothing, and more wrong answers never help."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.classes.protocols import leave_one_out, query_gallery, random_gallery
from evaluation.result import Section

KS = (1, 3)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, ids and labels in any order; copies and ties, some classes of one picture."""
    sizes = [*draw(st.lists(st.integers(1, 5), min_size=1, max_size=6)), 2]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    if draw(st.booleans()):
        vectors = generator.integers(-1, 2, (len(labels), 3)).astype(np.float32)
    else:
        vectors = generator.normal(size=(len(labels), 9)).astype(np.float32)
        vectors[-1] = vectors[0]
    return vectors, generator.permutation(100)[: len(labels)], labels


def by_name(section: Section) -> dict[str, dict[str, float]]:
    return {
        metric: dict(zip(section.query_names, values.tolist(), strict=True))
        for metric, values in section.per_query.items()
    }


def scalars(section: Section) -> dict[str, Any]:
    return {name: value for name, value in section.facts.items() if isinstance(value, int | str)}


@settings(max_examples=25, deadline=None)
@given(pictures=pictures(), seed=st.integers(0, 1000), ties=st.sampled_from(["index", "optimistic", "pessimistic"]))
def test_the_order_of_rows_changes_nothing(pictures: Any, seed: int, ties: Any) -> None:
    order = np.random.default_rng(seed).permutation(len(pictures[1]))
    shuffled = [array[order] for array in pictures]
    for protocol, options in ((leave_one_out, {}), (random_gallery, {"num_seeds": 2})):
        before = protocol(*pictures, ks=KS, ties=ties, **options)
        after = protocol(*shuffled, ks=KS, ties=ties, **options)
        assert by_name(before) == by_name(after)
        assert scalars(before) == scalars(after)


@settings(max_examples=25, deadline=None)
@given(pictures=pictures(), exponent=st.integers(-8, 8))
def test_the_scale_of_the_vectors_changes_nothing(pictures: Any, exponent: int) -> None:
    """Powers of two, so that every product is the same number but for its exponent."""
    vectors, ids, labels = pictures
    scaled = vectors * np.float32(2.0**exponent)
    assert by_name(leave_one_out(vectors, ids, labels, ks=KS)) == by_name(leave_one_out(scaled, ids, labels, ks=KS))


@settings(max_examples=25, deadline=None)
@given(pictures=pictures(), num_added=st.integers(1, 6), seed=st.integers(0, 1000))
def test_more_pictures_of_other_classes_never_help(pictures: Any, num_added: int, seed: int) -> None:
    vectors, ids, labels = pictures
    before = query_gallery(vectors, ids, labels, vectors, ids, labels, ks=KS)
    added = np.random.default_rng(seed).integers(-1, 2, (num_added, vectors.shape[1])).astype(np.float32)
    after = query_gallery(
        vectors,
        ids,
        labels,
        np.concatenate([vectors, added]),
        np.concatenate([ids, 200 + np.arange(num_added)]),
        np.concatenate([labels, np.full(num_added, 99)]),
        ks=KS,
    )
    for name, values in before.per_query.items():
        is_known = ~np.isnan(values)
        assert (after.per_query[name][is_known] <= values[is_known]).all(), name


@settings(max_examples=25, deadline=None)
@given(pictures=pictures())
def test_leave_one_out_is_a_gallery_searched_by_its_own_pictures(pictures: Any) -> None:
    vectors, ids, labels = pictures
    alone = leave_one_out(vectors, ids, labels, ks=KS)
    both = query_gallery(vectors, ids, labels, vectors, ids, labels, ks=KS)
    assert both.facts["num_unanswerable"] == alone.facts["num_alone"]
    assert both.facts["tie_gap"] == alone.facts["tie_gap"]
    for name, values in both.per_query.items():
        np.testing.assert_array_equal(values[~np.isnan(values)], alone.per_query[name])
