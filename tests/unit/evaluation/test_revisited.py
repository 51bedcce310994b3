import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from sklearn.metrics import average_precision_score

from evaluation.revisited import distractors as distractors_module
from evaluation.revisited.evaluate import RevisitedOutcome, curve_points, evaluate_descriptors, summarise_counts
from evaluation.revisited.ground_truth import (
    SETUPS,
    GroundTruth,
    QueryLabels,
    landmark_clusters,
    load_ground_truth,
)
from evaluation.revisited.rank_counts import RankCounts, TieRule
from lookalike.errors import DataError
from lookalike.ranking_metrics import average_precision, landmark_precision_at_k, trapezoid_average_precision
from lookalike.world import World
from tests.unit.evaluation.revisited_benchmarks import GOLDEN, LETTER, OFFICIAL, small_benchmark


@pytest.fixture(scope="module", params=["roxford5k", "rparis6k"])
def benchmark(request: pytest.FixtureRequest) -> tuple[str, GroundTruth, ndarray]:
    truth = load_ground_truth(GOLDEN / f"gnd_{request.param}.pkl")
    with np.load(GOLDEN / f"{request.param}_scores_f32.npz") as stored:
        return request.param, truth, stored["scores"]


def test_values_per_query_are_the_official_ones(benchmark: tuple[str, GroundTruth, ndarray]) -> None:
    name, truth, scores = benchmark
    result = summarise_counts(RankCounts.of_database(scores, truth.labels), truth, ties="index")
    for setup in SETUPS:
        golden = OFFICIAL[name][LETTER[setup]]
        official = np.array([np.nan if ap is None else ap for ap in golden["aps"]], float)
        found = result.sections[setup].per_query["map"]
        np.testing.assert_array_equal(np.isnan(found), np.isnan(official))
        np.testing.assert_allclose(found, official, atol=1e-9, equal_nan=True)
        assert int((~np.isnan(found)).sum()) == golden["nq"]
        assert result.sections[setup].mean("map") == pytest.approx(golden["map"], abs=1e-9)
        for k, expected in zip((1, 5, 10), golden["mpr"], strict=True):
            assert result.sections[setup].mean(f"mp@{k}") == pytest.approx(expected, abs=1e-9)


def test_oxford_easy_has_68_queries() -> None:
    truth = load_ground_truth(GOLDEN / "gnd_roxford5k.pkl")
    assert (len(truth.database_names), len(truth.query_names)) == (4993, 70)
    assert sum(len(labels.easy) > 0 for labels in truth.labels) == 68


def sorted_evaluation(scores: ndarray, labels: QueryLabels, setup: str, ties: str) -> tuple[float, float]:
    """The oracle: sorts everything, takes the junk out, and applies the definitions picture by picture."""
    relevant = set(labels.easy.tolist()) if setup != "hard" else set()
    relevant |= set(labels.hard.tolist()) if setup != "easy" else set()
    ignored = set(labels.labelled().tolist()) - relevant
    labelled = relevant | ignored

    def place(row: int) -> tuple[float, int, int]:
        # Among equal scores labelled pictures stand first (optimistic), last (pessimistic), or by row.
        standing = {"optimistic": int(row not in labelled), "pessimistic": int(row in labelled), "index": 0}
        return (-float(scores[row]), standing[ties], row)

    ranking = [row for row in sorted(range(len(scores)), key=place) if row not in ignored]
    positions = [position for position, row in enumerate(ranking) if row in relevant]
    if not positions:
        return float("nan"), float("nan")
    area = 0.0
    for found, position in enumerate(positions):
        before = found / position if position else 1.0
        area += (before + (found + 1) / (position + 1)) / 2 / len(positions)
    depth = min(positions[-1] + 1, 5)
    return area, sum(position < depth for position in positions) / depth


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_database=st.integers(6, 25), num_distractors=st.integers(0, 30))
def test_counting_equals_sorting_with_many_ties(seed: int, num_database: int, num_distractors: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 6, num_database + num_distractors).astype(np.float32)
    rows = generator.permutation(num_database)
    cuts = np.sort(generator.integers(0, min(6, num_database) + 1, 3))
    labels = QueryLabels(rows[: cuts[0]], rows[cuts[0] : cuts[1]], rows[cuts[1] : cuts[2]])
    truth = GroundTruth(tuple(map(str, range(num_database))), ("q",), np.zeros((1, 4)), (labels,), "")
    counts = RankCounts.of_database(scores[None, :num_database], truth.labels)
    middle = num_database + num_distractors // 3
    counts.add_distractors(scores[None, middle:])  # in any order
    counts.add_distractors(scores[None, num_database:middle])
    for ties in ("optimistic", "pessimistic", "index"):
        result = summarise_counts(counts, truth, ties=ties)
        for setup in SETUPS:
            expected = sorted_evaluation(scores, labels, setup, ties)
            values = result.sections[setup].per_query
            found = (values["map"][0], values["mp@5"][0])
            np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=f"{setup} {ties}")


def values_of(outcome: RevisitedOutcome) -> dict[str, list[float]]:
    """All numbers of an outcome, to the last bit."""
    sections = {
        f"{setup} {metric}": values.tolist()
        for setup, section in outcome.sections.items()
        for metric, values in {**section.per_query, "tie_gap": np.array([section.facts["tie_gap"]])}.items()
    }
    curve = {f"curve {point.num_distractors}": list(point.maps.values()) for point in outcome.curve}
    return {**sections, **curve, "num_distractors": [outcome.num_distractors]}


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=6), dtype=st.sampled_from(["f2", "f4", "f8"]))
def test_any_division_of_the_distractors_gives_the_same_bits(cuts: list[int], dtype: str) -> None:
    truth, queries, database, distractors = small_benchmark()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distractors_module, "_BLOCK_ROWS", 64)
        whole = evaluate_descriptors(queries, database, truth, distractors=[distractors], curve_at=[100, 130, 700])
        files = np.split(distractors.astype(dtype), sorted(cuts))
        parts = evaluate_descriptors(queries, database, truth, distractors=files, curve_at=[700, 100, 130, 4000])
    assert values_of(parts) == values_of(whole)
    assert [point.num_distractors for point in whole.curve] == [0, 100, 130, 700, 1000]


def test_a_curve_changes_nothing_and_each_of_its_points_is_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distractors_module, "_BLOCK_ROWS", 64)
    truth, queries, database, distractors = small_benchmark()
    curved = evaluate_descriptors(queries, database, truth, distractors=[distractors], curve_at=[10, 63, 64, 65, 500])
    plain = evaluate_descriptors(queries, database, truth, distractors=[distractors], curve_at=[])
    for setup in SETUPS:
        for metric, values in plain.sections[setup].per_query.items():
            np.testing.assert_array_equal(curved.sections[setup].per_query[metric], values)
        assert curved.sections[setup].facts == plain.sections[setup].facts
        assert curved.curve[-1].maps[setup] == plain.sections[setup].mean("map")
    assert [point.num_distractors for point in curved.curve] == [0, 10, 63, 64, 65, 500, 1000]
    for point in curved.curve:
        own = evaluate_descriptors(queries, database, truth, distractors=[distractors[: point.num_distractors]])
        assert point.maps == {setup: own.sections[setup].mean("map") for setup in SETUPS}


def test_points_of_a_curve_are_round_and_end_with_all_that_is_there() -> None:
    assert curve_points(0) == [0]
    assert curve_points(10_000) == [0, 10_000]
    assert curve_points(123_456) == [0, 10_000, 20_000, 50_000, 100_000, 123_456]
    assert curve_points(1_001_001)[-4:] == [200_000, 500_000, 1_000_000, 1_001_001]


@settings(max_examples=20, deadline=None)
@given(shares=st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_counts_of_workers_add_up_in_any_order(shares: list[int]) -> None:
    truth, queries, database, distractors = small_benchmark()
    scores, others = (queries.astype(np.float32) @ v.astype(np.float32).T for v in (database, distractors))
    alone = RankCounts.of_database(scores, truth.labels)
    alone.add_distractors(others)
    total = {name: np.zeros_like(array) for name, array in alone.state().items()}
    for worker in range(4):
        counts = RankCounts.of_database(scores, truth.labels)
        for share, block in zip(shares, np.array_split(others, 10, axis=1), strict=True):
            if share == worker:
                counts.add_distractors(block)
        total = {name: array + counts.state()[name] for name, array in total.items()}
    merged = RankCounts.of_database(scores, truth.labels)
    merged.load_state(total)
    for ties in ("index", "pessimistic"):
        found, expected = (summarise_counts(c, truth, ties=ties) for c in (merged, alone))
        assert values_of(found) == values_of(expected)


def test_a_copy_of_a_labelled_picture_among_the_distractors_ties_with_it() -> None:
    truth, queries, database, distractors = small_benchmark()
    copies = database[truth.labels[0].hard]
    crowd = [distractors[:777], copies, distractors[777:]]
    results = {
        ties: evaluate_descriptors(queries, database, truth, distractors=crowd, ties=ties).sections["hard"]
        for ties in ("optimistic", "pessimistic")
    }
    without = evaluate_descriptors(queries, database, truth, distractors=[distractors]).sections["hard"]
    optimistic, pessimistic = (results[ties].per_query["map"][0] for ties in ("optimistic", "pessimistic"))
    # Each copy stands behind all but its own twin at best, so precision falls, and further where it stands before it.
    assert pessimistic < optimistic < without.per_query["map"][0]
    gap = results["optimistic"].mean("map") - results["pessimistic"].mean("map")
    assert results["optimistic"].facts["tie_gap"] == pytest.approx(100 * gap, abs=1e-12)


def test_a_killed_count_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distractors_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(distractors_module, "_BLOCKS_PER_SAVE", 4)
    truth, queries, database, distractors = small_benchmark()
    expected = evaluate_descriptors(queries, database, truth, distractors=[distractors], curve_at=[500])
    progress = tmp_path / "progress.npz"
    original, blocks = distractors_module.score_blocks, []

    def killed_in_the_middle(*arguments):  # type: ignore[no-untyped-def]
        for block in original(*arguments):
            if block[0] == 18 * 32:
                raise KeyboardInterrupt
            blocks.append(block[0])
            yield block

    def evaluate(others: ndarray, *, curve_at: tuple[int, ...] = (500,), world: World = World()) -> RevisitedOutcome:
        return evaluate_descriptors(
            queries,
            database,
            truth,
            distractors=[others],
            curve_at=curve_at,
            progress_file=progress,
            world=world,
        )

    with monkeypatch.context() as patch:
        patch.setattr(distractors_module, "score_blocks", killed_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            evaluate(distractors)
    assert progress.exists()
    changed = distractors.copy()
    changed[32] += 1
    for others, points in ((changed, (500,)), (distractors[:999], (500,)), (distractors, (400,))):
        with pytest.raises(DataError, match="another evaluation"):
            evaluate(others, curve_at=points)
    with monkeypatch.context() as patch:
        patch.setattr(distractors_module, "score_blocks", killed_in_the_middle)
        blocks.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(distractors)
    assert blocks == [16 * 32, 17 * 32]  # it had gone on from the last save
    assert values_of(evaluate(distractors)) == values_of(expected)
    assert not progress.exists()
    progress.write_bytes(b"no counts")
    with pytest.raises(DataError, match="cannot be read as the counts"):
        evaluate(distractors)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), num_distractors=st.integers(0, 1000), ties=st.sampled_from(["index", "pessimistic"]))
def test_adding_distractors_never_helps(seed: int, num_distractors: int, ties: TieRule) -> None:
    truth, queries, database, distractors = small_benchmark(seed)
    crowd = [np.concatenate([database[:20], distractors[:num_distractors]])]  # copies tie
    alone = evaluate_descriptors(queries, database, truth, ties=ties)
    crowded = evaluate_descriptors(queries, database, truth, distractors=crowd, ties=ties)
    for setup in SETUPS:
        for metric, values in crowded.sections[setup].per_query.items():
            assert (values <= alone.sections[setup].per_query[metric]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), value=st.sampled_from([0.0, 1.0, 100.0]))
def test_junk_never_matters(seed: int, value: float) -> None:
    truth, queries, database, distractors = small_benchmark(seed)
    moved = database.copy()
    moved[truth.labels[0].junk] = value
    before, after = (
        evaluate_descriptors(queries, vectors, truth, distractors=[distractors]) for vectors in (database, moved)
    )
    for metric, values in after.sections["medium"].per_query.items():
        assert values[0] == before.sections["medium"].per_query[metric][0]
    # For other queries it is no junk.
    medium = [outcome.sections["medium"].per_query["map"] for outcome in (before, after)]
    assert (medium[0][1:] != medium[1][1:]).any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.125, 2.0, 64.0]))
def test_neither_the_order_of_the_database_nor_the_length_of_queries_matters(seed: int, scale: float) -> None:
    truth, queries, database, distractors = small_benchmark(seed)
    expected = evaluate_descriptors(queries, database, truth, distractors=[distractors], ties="optimistic")
    order = np.random.default_rng(seed).permutation(len(database))
    new_row = np.argsort(order)
    labels = tuple(QueryLabels(*(new_row[rows] for rows in (q.easy, q.hard, q.junk))) for q in truth.labels)
    shuffled = dataclasses.replace(truth, labels=labels)
    # A power of two scales products exactly.
    scaled = (queries * scale).astype(np.float32)
    found = evaluate_descriptors(scaled, database[order], shuffled, distractors=[distractors], ties="optimistic")
    assert values_of(found) == values_of(expected)


def test_rectangular_ap_is_that_of_scikit_learn_without_junk(benchmark: tuple[str, GroundTruth, ndarray]) -> None:
    _, truth, scores = benchmark
    counts = RankCounts.of_database(scores, truth.labels)
    num_compared = 0
    for setup in SETUPS:
        for row, labels, positions in zip(
            scores, truth.labels, counts.positions(truth.labels, setup, ties="index"), strict=True
        ):
            rows, is_relevant = labels.labelled(), labels.is_relevant(setup)
            kept = np.setdiff1d(np.arange(len(row)), rows[~is_relevant])
            if not len(positions) or len(np.unique(row[kept])) < len(kept):
                continue  # scikit-learn takes tied pictures together
            expected = average_precision_score(np.isin(kept, rows[is_relevant]), row[kept])
            assert average_precision(positions) == pytest.approx(expected, abs=1e-12)
            num_compared += 1
    assert num_compared > 150


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("roxford5k", [1, 4, 5, 5, 5, 5, 5, 8, 8, 8, 8, 8]), ("rparis6k", [5, 5, 5, 5, 5, 5, 8, 8, 8, 8, 8])],
)
def test_queries_of_one_landmark_are_one_cluster(name: str, sizes: list[int]) -> None:
    truth = load_ground_truth(GOLDEN / f"gnd_{name}.pkl")
    clusters = landmark_clusters(truth)
    assert np.sort(np.bincount(clusters)).tolist() == sizes
    relevant = [set(q.easy.tolist()) | set(q.hard.tolist()) for q in truth.labels]
    for i, j in itertools.combinations(range(len(relevant)), 2):
        if len(relevant[i] & relevant[j]) > 0.3 * len(relevant[i] | relevant[j]):
            assert clusters[i] == clusters[j]


def test_clusters_are_joined_through_others_and_queries_without_pictures_stand_alone() -> None:
    def labels(*easy: int) -> QueryLabels:
        return QueryLabels(np.array(easy, np.int64), np.zeros(0, np.int64), np.array([9]))

    own = (labels(), labels(0, 1), labels(5), labels(1, 2), labels(2, 3), labels())
    truth = GroundTruth(tuple("abcdefghij"), tuple("uvwxyz"), np.zeros((6, 4)), own, "")
    # 1-3 and 3-4 share a third of their pictures, 1 and 4 none.
    assert landmark_clusters(truth).tolist() == [0, 1, 2, 1, 1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, d: (q[:4], d), "4 query descriptors"),
        (lambda q, d: (q, d[:100]), "100 database descriptors"),
        (lambda q, d: (q, d[:, :8]), "16 dimensions"),
        (lambda q, d: (q, np.full_like(d, np.nan)), "NaN"),
    ],
)
def test_descriptors_that_do_not_fit_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    truth, queries, database, _ = small_benchmark()
    changed_queries, changed_database = change(queries, database)
    with pytest.raises(DataError, match=message):
        evaluate_descriptors(changed_queries, changed_database, truth)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_one_value_that_is_not_finite_among_the_distractors_is_refused(value: float) -> None:
    truth, queries, database, _ = small_benchmark()
    distractors = np.zeros((300, 16), np.float32)
    distractors[123] = value  # 3e38 is finite, its products are not
    with pytest.raises(DataError, match="distractors 0 to 300: the scores of distractors hold NaN or infinity"):
        evaluate_descriptors(queries * 8, database, truth, distractors=[distractors])


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_a_ground_truth_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps({"imlist": [], "qimlist": [], "gnd": [_Evil()]}))
    with pytest.raises(DataError, match="print"):
        load_ground_truth(tmp_path / "gnd.pkl")
    assert capsys.readouterr().out == ""
    bad = {"imlist": ["a"], "qimlist": ["q"], "gnd": [{"bbx": [0, 0, 1, 1], "easy": [3], "hard": [], "junk": []}]}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(DataError, match="outside the 1"):
        load_ground_truth(tmp_path / "bad.json")


def test_the_definitions_by_hand() -> None:
    # Relevant at positions 0 and 3: ((1 + 1)/2 + (1/3 + 2/4)/2) / 2.
    assert trapezoid_average_precision(np.array([0, 3])) == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 2)
    assert np.isnan(trapezoid_average_precision(np.zeros(0, np.int64)))
    # Both stand before 10, so k shrinks to 4.
    assert landmark_precision_at_k(np.array([0, 3]), 10) == 0.5
    assert landmark_precision_at_k(np.array([0, 3]), 1) == 1


def test_counts_of_vectors_that_were_mended_are_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One vector of each block is a sample: others may change, and a file that changed is another one."""
    monkeypatch.setattr("evaluation.revisited.distractors._BLOCK_ROWS", 16)
    monkeypatch.setattr("evaluation.revisited.distractors._BLOCKS_PER_SAVE", 1)
    generator = np.random.default_rng(0)
    truth = GroundTruth(
        ("a", "b", "c"), ("q",), np.zeros((1, 4)), (QueryLabels(*(np.array([n]) for n in range(3))),), ""
    )
    queries, database = generator.normal(size=(1, 8)), generator.normal(size=(3, 8))
    vectors = generator.normal(size=(100, 8)).astype(np.float32)
    broken = vectors.copy()
    broken[5] *= 50
    broken[90] = np.nan
    np.save(tmp_path / "d.npy", broken)
    file = tmp_path / "counts.npz"

    def evaluate() -> object:
        distractors = [np.load(tmp_path / "d.npy", mmap_mode="r")]
        return evaluate_descriptors(queries, database, truth, distractors=distractors, progress_file=file).curve

    with pytest.raises(DataError, match="NaN"):
        evaluate()
    assert not file.exists()
    np.save(tmp_path / "d.npy", vectors)
    assert evaluate() == evaluate_descriptors(queries, database, truth, distractors=[vectors]).curve
