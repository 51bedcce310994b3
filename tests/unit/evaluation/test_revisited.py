import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from evaluation.revisited import evaluate as evaluate_module
from evaluation.revisited.evaluate import evaluate_descriptors, result_as_json, summarise_counts
from evaluation.revisited.ground_truth import SETUPS, GroundTruth, QueryLabels, load_ground_truth
from evaluation.revisited.metrics import average_precision, precision_at_k
from evaluation.revisited.rank_counts import RankCounts
from lookalike.errors import DataError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "revisited"
OFFICIAL = json.loads((GOLDEN / "golden_revisitop.json").read_text())
LETTER = {"easy": "E", "medium": "M", "hard": "H"}


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
        found = result.per_query[setup]["map"]
        np.testing.assert_array_equal(np.isnan(found), np.isnan(official))
        np.testing.assert_allclose(found, official, atol=1e-9, equal_nan=True)
        assert int((~np.isnan(found)).sum()) == golden["nq"]
        assert result.mean(setup, "map") == pytest.approx(golden["map"], abs=1e-9)
        for k, expected in zip((1, 5, 10), golden["mpr"], strict=True):
            assert result.mean(setup, f"mp@{k}") == pytest.approx(expected, abs=1e-9)


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
            found = (result.per_query[setup]["map"][0], result.per_query[setup]["mp@5"][0])
            np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=f"{setup} {ties}")


def small_benchmark(seed: int = 0) -> tuple[GroundTruth, ndarray, ndarray, ndarray]:
    generator = np.random.default_rng(seed)
    labels = tuple(QueryLabels(*np.split(generator.permutation(200)[:30], [10, 20])) for _ in range(5))
    truth = GroundTruth(tuple(map(str, range(200))), tuple("abcde"), np.zeros((5, 4)), labels, "f" * 64)
    vectors = generator.normal(size=(5 + 200 + 1000, 16)).astype(np.float16)
    return truth, vectors[:5], vectors[5:205], vectors[205:]


def test_any_division_of_the_distractors_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "_BLOCK_ROWS", 64)
    truth, queries, database, distractors = small_benchmark()
    whole = evaluate_descriptors(queries, database, truth, distractors=[distractors])
    parts = evaluate_descriptors(queries, database, truth, distractors=[distractors[:640], distractors[640:]])
    # Workers with a part of the blocks each: integer counts add up.
    first = RankCounts.of_database(queries.astype(np.float32) @ database.astype(np.float32).T, truth.labels)
    for setup in SETUPS:
        for metric, values in whole.per_query[setup].items():
            np.testing.assert_array_equal(parts.per_query[setup][metric], values)
    assert whole.num_distractors == 1000
    scores = queries.astype(np.float32) @ distractors.astype(np.float32).T
    first.add_distractors(scores[:, 500:])
    state = first.state()
    second = RankCounts.of_database(queries.astype(np.float32) @ database.astype(np.float32).T, truth.labels)
    second.load_state(state)
    second.add_distractors(scores[:, :500])
    again = summarise_counts(second, truth, ties="index")
    for setup in SETUPS:
        np.testing.assert_allclose(again.per_query[setup]["map"], whole.per_query[setup]["map"], atol=1e-12)


def test_a_killed_count_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(evaluate_module, "_BLOCKS_PER_SAVE", 4)
    truth, queries, database, distractors = small_benchmark()
    expected = evaluate_descriptors(queries, database, truth, distractors=[distractors])
    original, calls = RankCounts.add_distractors, []

    def killed_in_the_middle(self: RankCounts, scores: ndarray) -> None:
        if len(calls) == 18:
            raise KeyboardInterrupt
        calls.append(1)
        original(self, scores)

    progress = tmp_path / "progress.npz"
    with monkeypatch.context() as patch:
        patch.setattr(RankCounts, "add_distractors", killed_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            evaluate_descriptors(queries, database, truth, distractors=[distractors], progress_file=progress)
    assert progress.exists()
    changed = distractors.copy()
    changed[32] += 1
    with pytest.raises(DataError, match="another evaluation"):
        evaluate_descriptors(queries, database, truth, distractors=[changed], progress_file=progress)
    resumed = evaluate_descriptors(queries, database, truth, distractors=[distractors], progress_file=progress)
    assert resumed.per_query["hard"]["map"].tolist() == expected.per_query["hard"]["map"].tolist()
    assert resumed.num_distractors == 1000
    assert not progress.exists()


def test_adding_distractors_never_helps_and_junk_never_matters() -> None:
    truth, queries, database, distractors = small_benchmark(1)
    alone = evaluate_descriptors(queries, database, truth)
    crowded = evaluate_descriptors(queries, database, truth, distractors=[distractors])
    moved = database.copy()
    junk = truth.labels[0].junk
    moved[junk] = 0
    without = evaluate_descriptors(queries, moved, truth)
    for setup in SETUPS:
        assert (crowded.per_query[setup]["map"] <= alone.per_query[setup]["map"]).all()
    assert without.per_query["medium"]["map"][0] == alone.per_query["medium"]["map"][0]
    assert without.per_query["medium"]["map"][1] != alone.per_query["medium"]["map"][1]


def test_json_holds_percent_counts_and_the_record() -> None:
    truth, queries, database, _ = small_benchmark()
    tree = result_as_json(evaluate_descriptors(queries, database, truth), truth, {"ground_truth": truth.sha256})
    assert json.loads(json.dumps(tree)) == tree
    assert tree["easy"]["map"] == pytest.approx(np.mean(list(tree["easy"]["aps"].values())))
    assert 1 < tree["medium"]["map"] < 100
    assert tree["record"] == {"ground_truth": "f" * 64, "ties": "index", "num_distractors": 0}


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
    with pytest.raises(DataError, match=message):
        evaluate_descriptors(*change(queries, database), truth)
    with pytest.raises(DataError, match="distractors 0 to"):
        evaluate_descriptors(queries, database, truth, distractors=[np.full((3, 16), np.inf, np.float32)])


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
    assert average_precision(np.array([0, 3])) == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 2)
    assert np.isnan(average_precision(np.zeros(0, np.int64)))
    # Both stand before 10, so k shrinks to 4.
    assert precision_at_k(np.array([0, 3]), 10) == 0.5
    assert precision_at_k(np.array([0, 3]), 1) == 1
