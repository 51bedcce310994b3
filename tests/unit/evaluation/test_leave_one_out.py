import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.bootstrap import bootstrap_mean
from evaluation.leave_one_out import evaluate_leave_one_out, paired_difference, without_query
from lookalike.errors import DataError


def slow_evaluation(vectors: np.ndarray, labels: np.ndarray, ks: tuple[int, ...]) -> dict[str, list[float]]:
    """The oracle: one query at a time, a full sort, the definitions word for word."""
    values: dict[str, list[float]] = {**{f"R@{k}": [] for k in ks}, "MAP@R": []}
    for query in range(len(vectors)):
        others = [i for i in range(len(vectors)) if i != query]
        if not any(labels[i] == labels[query] for i in others):
            continue
        ranking = sorted(others, key=lambda i: (-float(np.float32(vectors[query] @ vectors[i])), i))
        is_relevant = [labels[i] == labels[query] for i in ranking]
        r = sum(is_relevant)
        for k in ks:
            values[f"R@{k}"].append(float(any(is_relevant[:k])))
        precisions = [sum(is_relevant[:i]) / i for i in range(1, r + 1) if is_relevant[i - 1]]
        values["MAP@R"].append(sum(precisions) / r)
    return values


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=8), seed=st.integers(0, 1000))
def test_metrics_equal_a_full_sort_with_ties_and_lonely_pictures(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if max(sizes) < 2:
        sizes[0] = 2
        labels = np.repeat(np.arange(len(sizes)), sizes)
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-1, 2, (len(labels), 3)).astype(np.float32)  # many ties
    ids = np.arange(len(labels))
    ks = (1, 2)
    if len(labels) <= 2:
        ks = (1,)
    result = evaluate_leave_one_out(vectors, ids, labels, ks=ks)
    for name, expected in slow_evaluation(vectors, labels, ks).items():
        np.testing.assert_allclose(result.per_query[name], expected, err_msg=name)
    assert result.num_alone == sum(size == 1 for size in sizes)


def test_a_copy_of_the_query_is_found_and_the_query_itself_is_not() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    result = evaluate_leave_one_out(vectors, np.array([40, 30, 20, 10]), np.array([0, 0, 1, 1]), ks=(1,))
    np.testing.assert_array_equal(result.ranked_ids[:, 0], [30, 40, 10, 20])
    assert result.per_query["R@1"].mean() == 1


def test_pictures_that_cannot_be_judged_are_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(DataError, match="1 pictures have no class"):
        evaluate_leave_one_out(vectors, np.arange(3), np.array([0, 0, -1]))
    with pytest.raises(DataError, match="no class has two"):
        evaluate_leave_one_out(vectors, np.arange(3), np.arange(3))


def test_the_query_leaves_a_ranking_by_id_wherever_it_stands() -> None:
    ranked = np.array([[5, 1, 2], [1, 5, 2], [1, 2, 3]])
    np.testing.assert_array_equal(without_query(ranked, np.array([5, 5, 5])), [[1, 2], [1, 2], [1, 2]])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 samples of a population with mean .3, in clusters of 5 equal values; 95% +- 4 standard errors."""
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(80), 5)
    covered, widths = 0, []
    for seed in range(200):
        values = np.repeat((generator.random(80) < 0.3).astype(float), 5)
        estimate = bootstrap_mean(values, clusters, seed=seed, num_resamples=400)
        covered += estimate.low <= 0.3 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.88 <= covered / 200 <= 1.0
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 80), rel=0.1)


def test_clusters_widen_the_interval_and_nan_is_left_out() -> None:
    values = np.tile([0.0, 1.0], 50)
    plain = bootstrap_mean(values, np.arange(100))
    clustered = bootstrap_mean(np.sort(values), np.arange(100) // 10)
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)
    assert bootstrap_mean(np.array([1.0, np.nan, 1.0]), np.arange(3)).mean == 1
    alone = bootstrap_mean(np.array([0.0, 1.0]), np.zeros(2, np.int64))
    assert alone.mean == 0.5
    assert np.isnan([alone.low, alone.high]).all(), "one cluster says nothing about others"
    with pytest.raises(ValueError, match="no query has a value"):
        bootstrap_mean(np.array([np.nan]), np.arange(1))


def test_a_paired_difference_is_tighter_than_the_two_intervals() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 4)
    vectors = generator.normal(size=(50, 8))[labels] + 0.8 * generator.normal(size=(200, 8))
    noisy = vectors + 0.4 * generator.normal(size=vectors.shape)
    better = evaluate_leave_one_out(vectors.astype(np.float32), np.arange(200), labels, ks=(1,))
    worse = evaluate_leave_one_out(noisy.astype(np.float32), np.arange(200), labels, ks=(1,))
    lead = paired_difference(better, worse, "MAP@R")
    own = better.estimates()["MAP@R"]
    assert lead.mean == pytest.approx(own.mean - worse.estimates()["MAP@R"].mean)
    assert lead.high - lead.low < own.high - own.low
    other = evaluate_leave_one_out(vectors[:100].astype(np.float32), np.arange(100), labels[:100], ks=(1,))
    with pytest.raises(ValueError, match="same queries"):
        paired_difference(better, other, "R@1")
