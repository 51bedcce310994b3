"""The metrics by hand; tests/unit/evaluation holds them against other programs and brute force."""

import numpy as np
import pytest

from lookalike.ranking_metrics import (
    average_precision,
    average_precision_at_r,
    bounds,
    class_metrics,
    hit_rate_at_k,
    landmark_metrics,
    measure,
    positions_in_list,
    r_precision,
    recall_at_k,
    rs_target_at_k,
    with_missing_last,
)

# Of three relevant pictures the first stands at the top, the second at place 3, the last far behind.
POSITIONS = np.array([0, 2, 9])


def test_metrics_equal_the_hand_computed_values() -> None:
    assert [hit_rate_at_k(POSITIONS, k) for k in (1, 2)] == [1, 1]
    assert [hit_rate_at_k(np.array([1]), k) for k in (1, 2)] == [0, 1]
    assert recall_at_k(POSITIONS, 3) == pytest.approx(2 / 3)
    assert rs_target_at_k(POSITIONS, 2) == pytest.approx(1 / 2)
    assert r_precision(POSITIONS) == pytest.approx(2 / 3)
    # Precision 1/1 at place 1 and 2/3 at place 3; the last one is beyond R = 3.
    assert average_precision_at_r(POSITIONS) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision(POSITIONS) == pytest.approx((1 + 2 / 3 + 3 / 10) / 3)


def test_a_perfect_ranking_scores_one_and_nothing_relevant_has_no_value() -> None:
    metrics = {**class_metrics((1, 2)), **landmark_metrics((1, 2))}
    perfect, nothing = np.arange(2), np.zeros(0, np.int64)
    values = measure(metrics, [perfect, nothing])
    for name, (best, none) in values.items():
        assert best == (0.5 if name in ("recall@1", "mr@1") else 1), name
        assert np.isnan(none), name


def test_a_list_gives_positions_without_what_is_ignored() -> None:
    found, depth = positions_in_list(np.array([5, 9, 6, 8, -1]), np.array([6, 7, 8]), np.array([9]))
    assert (found.tolist(), depth) == ([1, 2], 3)
    with pytest.raises(ValueError, match="twice"):
        positions_in_list(np.array([1, 1]), np.array([1]), np.zeros(0, np.int64))


def test_a_short_list_bounds_a_metric_from_the_worst_ending_to_the_best() -> None:
    found = np.array([0])
    assert with_missing_last(found, num_relevant=3, num_ranked=10).tolist() == [0, 8, 9]
    assert with_missing_last(np.arange(3), num_relevant=3, num_ranked=3).tolist() == [0, 1, 2]
    least, greatest = bounds(average_precision, found, num_relevant=3, depth=2, num_ranked=10)
    assert least == average_precision(np.array([0, 8, 9]))
    assert greatest == average_precision(np.array([0, 2, 3]))
    with pytest.raises(ValueError, match="cannot come from"):
        bounds(average_precision, found, num_relevant=3, depth=2, num_ranked=3)
