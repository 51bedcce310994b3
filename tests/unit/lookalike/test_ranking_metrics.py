import numpy as np
import pytest

from lookalike.ranking_metrics import average_precision_at_r, hit_rate_at_k, recall_at_k, relevance_of_ranking

# Two queries by hand: ranks of relevant images are {1, 3} of 3 relevant, and {2} of 1 relevant.
RANKED = np.array([[5, 9, 6, 8], [1, 2, 3, -1]])
RELEVANT = [np.array([5, 6, 7]), np.array([2])]
NUM_RELEVANT = np.array([3, 1])


def test_metrics_equal_the_hand_computed_values() -> None:
    relevance = relevance_of_ranking(RANKED, RELEVANT)
    np.testing.assert_array_equal(relevance, [[1, 0, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(hit_rate_at_k(relevance, 1), [1, 0])
    np.testing.assert_array_equal(hit_rate_at_k(relevance, 2), [1, 1])
    np.testing.assert_allclose(recall_at_k(relevance, NUM_RELEVANT, 2), [1 / 3, 1])
    # Query 0: R = 3, precision 1/1 at position 1 and 2/3 at position 3, over 3. Query 1: R = 1, position 1 is wrong.
    np.testing.assert_allclose(average_precision_at_r(relevance, NUM_RELEVANT), [(1 + 2 / 3) / 3, 0])


def test_a_perfect_ranking_scores_one_and_padding_is_never_relevant() -> None:
    relevance = relevance_of_ranking(np.array([[7, 5, 6, -1]]), [np.array([5, 6, 7, -1])])
    np.testing.assert_array_equal(relevance, [[1, 1, 1, 0]])
    assert average_precision_at_r(relevance, np.array([3])) == 1


def test_a_query_without_relevant_images_has_no_value() -> None:
    relevance = relevance_of_ranking(np.array([[1, 2]]), [np.zeros(0, np.int64)])
    assert np.isnan(recall_at_k(relevance, np.array([0]), 1)).all()
    assert np.isnan(average_precision_at_r(relevance, np.array([0]))).all()


def test_rankings_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        relevance_of_ranking(np.array([[1, 1]]), [np.array([1])])
    with pytest.raises(ValueError, match="2 rankings but 1"):
        relevance_of_ranking(RANKED, RELEVANT[:1])
    relevance = relevance_of_ranking(RANKED, RELEVANT)
    with pytest.raises(ValueError, match="needs the first 5"):
        hit_rate_at_k(relevance, 5)
    with pytest.raises(ValueError, match="needs the first 9"):
        average_precision_at_r(relevance, np.array([9, 1]))
