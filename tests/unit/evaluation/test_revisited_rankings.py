"""Rankings of anybody's on revisited Oxford and Paris, whole or cut off."""

import dataclasses

import numpy as np
import pytest
from numpy import ndarray

from evaluation.revisited import nearest as nearest_module
from evaluation.revisited.evaluate import evaluate_descriptors
from evaluation.revisited.ground_truth import (
    SETUPS,
    QueryLabels,
    Setup,
    load_ground_truth,
)
from evaluation.revisited.nearest import nearest
from evaluation.revisited.rankings import evaluate_rankings
from lookalike.errors import DataError
from tests.unit.evaluation.revisited_benchmarks import GOLDEN, LETTER, OFFICIAL, small_benchmark


def ranked_by_sorting(queries: ndarray, gallery: ndarray) -> ndarray:
    scores = queries.astype(np.float32) @ gallery.astype(np.float32).T
    return np.argsort(-scores, axis=1, kind="stable").astype(np.int64)


def test_a_whole_ranking_gives_the_numbers_of_counting() -> None:
    truth, queries, database, distractors = small_benchmark()
    counted = evaluate_descriptors(queries, database, truth, distractors=[distractors])
    ranked = ranked_by_sorting(queries, np.concatenate([database, distractors]))
    listed = evaluate_rankings(ranked, truth, num_distractors=1000)
    for setup in SETUPS:
        assert listed.sections[setup].bounds == {}
        for metric, values in counted.sections[setup].per_query.items():
            np.testing.assert_allclose(listed.sections[setup].per_query[metric], values, atol=1e-12)
    assert listed.num_distractors == 1000


def test_bounds_of_a_truncated_list_hold_the_whole_ranking_s_value_and_shrink_to_it() -> None:
    truth, queries, database, distractors = small_benchmark(2, num_database=60)
    empty = QueryLabels(np.zeros(0, np.int64), *np.split(np.arange(10), 2))
    truth = dataclasses.replace(truth, labels=(empty, *truth.labels[1:]))
    ranked = ranked_by_sorting(queries, np.concatenate([database, distractors[:30]]))
    whole = evaluate_rankings(ranked, truth, num_distractors=30)
    previous: dict[tuple[str, str], ndarray] = {}
    for depth in range(91):
        # A list may also end in -1, as of an index that found no more.
        padding = np.full((5, 7), -1)
        outcome = evaluate_rankings(np.hstack([ranked[:, :depth], padding]), truth, num_distractors=30)
        for setup in SETUPS:
            section = outcome.sections[setup]
            assert section.facts == {"shortest_list": depth}
            assert {*section.per_query, *section.bounds} == set(whole.sections[setup].per_query)
            for metric, value in whole.sections[setup].per_query.items():
                if metric in section.per_query:
                    np.testing.assert_array_equal(section.per_query[metric], value)
                own = section.bounds.get(metric, np.stack([value, value], axis=1))
                assert metric not in section.bounds or (own[:, 0] < own[:, 1]).any()
                known = ~np.isnan(value)
                assert known.tolist() == [setup != "easy", True, True, True, True]
                assert (np.isnan(own).all(axis=1) == ~known).all()
                before = previous.get((setup, metric), np.tile([0.0, 1.0], (5, 1)))
                low, high = own[known].T
                assert (before[known][:, 0] <= low + 1e-12).all()
                assert (low <= value[known] + 1e-12).all()
                assert (value[known] <= high + 1e-12).all()
                assert (high <= before[known][:, 1] + 1e-12).all()
                previous[setup, metric] = own
    assert all(section.bounds == {} for section in outcome.sections.values())


# mAP in percent that the official evaluation, that of tests/golden/README.md, gives for the first 100 or 1000 of the
# golden scores' ranking. It cannot evaluate a list without any relevant picture, so there are no others.
OFFICIAL_OF_TRUNCATED: dict[tuple[str, Setup, int], float] = {
    ("rparis6k", "easy", 1000): 86.69629934935938,
    ("rparis6k", "medium", 100): 39.13815578000078,
    ("rparis6k", "medium", 1000): 75.18178546337874,
    ("rparis6k", "hard", 1000): 56.9377927729929,
}


@pytest.mark.parametrize(("name", "setup", "depth"), OFFICIAL_OF_TRUNCATED)
def test_the_official_value_of_a_truncated_list_is_the_least_in_an_endless_gallery(
    name: str, setup: Setup, depth: int
) -> None:
    truth = load_ground_truth(GOLDEN / f"gnd_{name}.pkl")
    with np.load(GOLDEN / f"{name}_scores_f32.npz") as stored:
        ranked = np.argsort(-stored["scores"], axis=1, kind="stable").astype(np.int64)
    official = OFFICIAL_OF_TRUNCATED[name, setup, depth]
    whole = 100 * OFFICIAL[name][LETTER[setup]]["map"]
    bounds = 100 * evaluate_rankings(ranked[:, :depth], truth, num_distractors=0).sections[setup].bounds["map"]
    low, high = bounds.mean(axis=0)
    assert official < low < whole < high
    endless = evaluate_rankings(ranked[:, :depth], truth, num_distractors=10**12).sections[setup].bounds["map"]
    assert 100 * endless[:, 0].mean() == pytest.approx(official, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:4], "4 rankings, the ground truth has 5"),
        (lambda rows: np.where(np.arange(20) == 3, 1200, rows), r"ranking of a names row 1200; .* have 1200 rows"),
        (lambda rows: np.where(np.arange(20) == 3, -2, rows), "names row -2"),
        (lambda rows: np.where(np.arange(20) == 3, -1, rows), "ranking of a goes on behind a -1"),
        (lambda rows: np.concatenate([rows, rows[:, 4:5]], axis=1), r"ranking of a names row \d+ more than once"),
    ],
)
def test_lists_that_are_no_ranking_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    truth, queries, database, distractors = small_benchmark()
    ranked = ranked_by_sorting(queries, np.concatenate([database, distractors]))[:, :20]
    with pytest.raises(DataError, match=message):
        evaluate_rankings(change(ranked), truth, num_distractors=1000)


@pytest.mark.parametrize("k", [1, 10, 300])
def test_the_nearest_are_the_start_of_the_ranking_whatever_the_files(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_module, "_BLOCK_ROWS", 64)
    # Whole numbers: products are exact, and many scores are equal.
    vectors = np.random.default_rng(0).integers(-2, 3, (250, 4)).astype(np.float16)
    queries, database, distractors = vectors[:5], vectors[5:105], vectors[105:]
    hits = nearest(queries, database, [distractors[:70], distractors[70:]], k=k)
    expected = ranked_by_sorting(queries, vectors[5:])
    num_found = min(k, 245)
    np.testing.assert_array_equal(hits.ids[:, :num_found], expected[:, :num_found])
    assert (hits.ids[:, num_found:] == -1).all()
    assert hits.ids.shape == hits.scores.shape == (5, k)
    with pytest.raises(DataError, match="rows 64 to 103"):
        nearest(queries, database, [np.full((3, 4), np.nan)], k=k)
