import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike import exact_search as module
from lookalike.exact_search import exact_search, merge_hits
from lookalike.records import Effort, SearchParameters


def sorted_search(queries, gallery, ids, *, k, excluded_ids=None):  # type: ignore[no-untyped-def]
    """The oracle: all scores, sorted in Python by (-score, id)."""
    answers = []
    for row, query in enumerate(queries):
        scored = [
            (-float(score), int(identifier))
            for score, identifier in zip(gallery @ query, ids, strict=True)
            if excluded_ids is None or identifier != excluded_ids[row]
        ]
        best = sorted(scored)[:k]
        answers.append([identifier for _, identifier in best] + [-1] * (k - len(best)))
    return np.array(answers)


@settings(max_examples=60, deadline=None)
@given(
    num_gallery=st.integers(0, 40),
    num_queries=st.integers(1, 5),
    k=st.integers(1, 12),
    block_rows=st.integers(1, 50),
    largest_pool=st.sampled_from([1, 1000]),
    seed=st.integers(0, 10_000),
    excludes=st.booleans(),
)
def test_streaming_equals_a_full_sort_with_ties_by_id(
    num_gallery, num_queries, k, block_rows, largest_pool, seed, excludes
):  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(seed)
    # Small integers make many exact ties.
    gallery = generator.integers(-1, 2, (num_gallery, 3)).astype(np.float32)
    queries = generator.integers(-1, 2, (num_queries, 3)).astype(np.float32)
    ids = generator.permutation(1000)[:num_gallery].astype(np.int64)
    excluded = generator.integers(0, 1000, num_queries).astype(np.int64) if excludes else None
    if excluded is not None and num_gallery:
        excluded[0] = ids[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_OF_FIRST_BLOCK", min(block_rows, 7))
        patch.setattr(module, "_MOST_ROWS_OF_BLOCK", block_rows)
        patch.setattr(module, "_LARGEST_POOL", largest_pool)
        hits = exact_search(queries, gallery, ids, k=k, excluded_ids=excluded)
    np.testing.assert_array_equal(hits.ids, sorted_search(queries, gallery, ids, k=k, excluded_ids=excluded))
    assert np.isneginf(hits.scores[hits.ids < 0]).all()


def test_parts_merge_to_the_search_of_the_whole() -> None:
    generator = np.random.default_rng(0)
    gallery = generator.integers(-2, 3, (60, 4)).astype(np.float32)
    queries = generator.integers(-2, 3, (7, 4)).astype(np.float32)
    ids = np.arange(60)
    whole = exact_search(queries, gallery, ids, k=9)
    parts = [exact_search(queries, gallery[a:b], ids[a:b], k=9) for a, b in [(0, 5), (5, 40), (40, 60)]]
    merged = merge_hits(parts[::-1], k=9)
    np.testing.assert_array_equal(merged.ids, whole.ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (np.zeros((1, 3), np.float32), 1, "length 2"),
        (np.array([[np.nan, 0]], np.float32), 1, "NaN"),
        (np.zeros((1, 2), np.float32), 0, "k must"),
    ],
)
def test_unusable_queries_are_refused(query: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_search(query, np.zeros((4, 2), np.float32), np.arange(4), k=k)


def test_scores_do_not_depend_on_batch_order_or_parts() -> None:
    generator = np.random.default_rng(3)
    gallery = generator.normal(size=(3000, 37)).astype(np.float32)
    gallery[1500:] = gallery[:1500]  # every vector twice: each pair of copies ties to the last bit
    queries = generator.normal(size=(9, 37)).astype(np.float32)
    ids = generator.permutation(3000).astype(np.int64)
    together = exact_search(queries, gallery, ids, k=21)
    order = generator.permutation(3000)
    permuted = exact_search(queries, gallery[order], ids[order], k=21)
    alone = [exact_search(query[None], gallery, ids, k=21) for query in queries]
    np.testing.assert_array_equal(permuted.ids, together.ids)
    np.testing.assert_array_equal(permuted.scores, together.scores)
    np.testing.assert_array_equal(np.concatenate([hits.ids for hits in alone]), together.ids)
    np.testing.assert_array_equal(np.concatenate([hits.scores for hits in alone]), together.scores)
    true_scores = (queries.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(together.scores[:, 0], true_scores.max(axis=1))


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="k must"):
        SearchParameters(k=0)
    with pytest.raises(ValueError, match="num_probes"):
        Effort(num_probes=0)
    with pytest.raises(ValueError, match="recall"):
        SearchParameters(recall=1.5)
