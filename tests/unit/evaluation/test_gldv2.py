import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.bootstrap import bootstrap_mean
from evaluation.gldv2.recognition import RecognitionScores, recognise, score_recognition
from evaluation.gldv2.retrieval import average_precision_at_k, score_retrieval
from evaluation.gldv2.solutions import (
    RecognitionSolution,
    RetrievalSolution,
    read_recognition_solution,
    read_retrieval_solution,
)
from evaluation.gldv2.submissions import (
    read_recognition_submission,
    read_retrieval_submission,
    write_recognition_submission,
    write_retrieval_submission,
)
from lookalike.errors import DataError

PUBLISHED = json.loads((Path(__file__).resolve().parents[2] / "golden" / "delf_vectors.json").read_text())
CSV = PUBLISHED["gldv2_csv"]

IMAGE_IDS = st.text("0123456789abcdef", min_size=16, max_size=16)


def numbered_id(number: int) -> str:
    return f"{number:016x}"


def retrieval_solution(relevant: Mapping[str, Sequence[str]]) -> RetrievalSolution:
    return RetrievalSolution(
        usages=dict.fromkeys(relevant, "Public"),
        relevant={query: frozenset(images) for query, images in relevant.items()},
    )


def recognition_solution(landmarks: Mapping[str, Sequence[int]]) -> RecognitionSolution:
    return RecognitionSolution(
        usages=dict.fromkeys(landmarks, "Public"),
        landmarks={query: frozenset(own) for query, own in landmarks.items()},
    )


def file_with(folder: Path, text: str) -> Path:
    file = folder / "rows.csv"
    file.write_text(text)
    return file


# The values that the authors of the data set published


def test_retrieval_gives_the_published_values() -> None:
    case = PUBLISHED["gldv2_retrieval"]
    expected = case["expected"]
    scores = {k: score_retrieval(case["predictions"], retrieval_solution(case["solution"]), k=k) for k in (1, 2, 100)}
    assert scores[100].mean_average_precision() == pytest.approx(expected["mAP@100"], abs=1e-6)
    assert scores[1].mean_average_precision() == pytest.approx(expected["mAP@1"], abs=1e-6)
    np.testing.assert_allclose(scores[2].mean_precisions(), expected["mean_precisions_max2"], atol=1e-6)
    for k in (1, 100):
        assert scores[k].mean_position() == pytest.approx(expected[f"mean_position_{k}"], abs=1e-6)
        assert scores[k].median_position() == pytest.approx(expected[f"median_position_{k}"], abs=1e-6)
        assert scores[k].num_missing_queries == 1


def test_recognition_gives_the_published_values() -> None:
    case = PUBLISHED["gldv2_recognition"]
    predictions = {query: (entry["class"], entry["score"]) for query, entry in case["predictions"].items()}
    scores = score_recognition(predictions, recognition_solution(case["solution"]))
    forgiving = scores.of_queries_with_landmark()
    assert scores.global_average_precision() == pytest.approx(case["expected"]["GAP"], abs=1e-6)
    assert forgiving.global_average_precision() == pytest.approx(case["expected"]["GAP_ignore_non_gt"], abs=1e-6)
    assert scores.top1_accuracy() == pytest.approx(case["expected"]["top1"], abs=1e-6)
    assert scores.num_missing_queries == 2


def test_the_published_retrieval_files_are_read(tmp_path: Path) -> None:
    solution = read_retrieval_solution(file_with(tmp_path, CSV["retrieval_solution"]))
    expected = {"Public": CSV["retrieval_public"], "Private": CSV["retrieval_private"]}
    for usage, answers in expected.items():
        found = {query: own for query, own in solution.relevant.items() if solution.usages[query] == usage}
        assert found == {query: frozenset(images) for query, images in answers.items()}
    assert [query for query, usage in solution.usages.items() if usage == "Ignored"] == CSV["retrieval_ignored"]

    text = CSV["retrieval_predictions"]
    predictions = read_retrieval_submission(file_with(tmp_path, text), solution.usages)
    assert predictions == {
        "0123456789abcdef": ("fedcba9876543250",),
        "0423456789abcdef": ("fedcba9876543260",),
        "0223456789abcdef": ("fedcba9876543210", "fedcba9876543200", "fedcba9876543220"),
        "0523456789abcdef": (),
    }
    # Public: both images first. Private: one query answered wrongly, one left out; ignored ones do not count.
    scores = score_retrieval(predictions, solution)
    assert scores.of_usage("Public").mean_average_precision() == 1
    assert scores.of_usage("Private").mean_average_precision() == 0
    assert [scores.of_usage(usage).num_missing_queries for usage in ("Public", "Private")] == [0, 1]
    assert scores.num_missing_queries == 1


def test_the_published_recognition_solution_is_read(tmp_path: Path) -> None:
    solution = read_recognition_solution(file_with(tmp_path, CSV["recognition_solution"]))
    assert solution.landmarks == {
        "0123456789abcdef": frozenset({0, 12}),
        "0223456789abcdef": frozenset(),
        "0423456789abcdef": frozenset({1}),
    }
    assert list(solution.usages.values()) == ["Public", "Public", "Ignored", "Private", "Ignored"]


# Retrieval


def test_a_repeated_image_is_skipped_but_keeps_its_place() -> None:
    assert average_precision_at_k(["a", "a", "b"], {"a", "b"}) == pytest.approx(5 / 6)


def test_average_precision_of_nothing_relevant_is_not_a_number() -> None:
    assert np.isnan(average_precision_at_k(["a"], set()))


def test_k_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        average_precision_at_k(["a"], {"a"}, 0)


def defined_average_precision(predicted: list[int], relevant: set[int], k: int) -> float:
    """The oracle: 1 / min(relevant, k) times the sum of precision(i) where the i-th is relevant and new."""
    total = 0.0
    for i in range(1, min(len(predicted), k) + 1):
        is_new = predicted[i - 1] not in predicted[: i - 1]
        if is_new and predicted[i - 1] in relevant:
            total += len(set(predicted[:i]) & relevant) / i
    return total / min(len(relevant), k)


@settings(max_examples=200, deadline=None)
@given(
    rankings=st.lists(st.none() | st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=4),
    relevant=st.sets(st.integers(0, 8), min_size=1),
    k=st.integers(1, 14),
)
def test_retrieval_equals_the_definition(rankings: list[list[int] | None], relevant: set[int], k: int) -> None:
    queries = [numbered_id(number) for number in range(len(rankings))]
    images = {query: [numbered_id(image) for image in relevant] for query in queries}
    predictions = {
        query: [numbered_id(image) for image in ranking]
        for query, ranking in zip(queries, rankings, strict=True)
        if ranking is not None
    }
    scores = score_retrieval(predictions, retrieval_solution(images), k=k)
    complete = [ranking or [] for ranking in rankings]
    expected = [defined_average_precision(ranking, relevant, k) for ranking in complete]
    np.testing.assert_allclose(scores.average_precisions, expected, atol=1e-12)
    precisions = [[len(set(ranking[:i]) & relevant) / i for i in range(1, k + 1)] for ranking in complete]
    np.testing.assert_allclose(scores.precisions, precisions, atol=1e-12)
    first = [next((i for i, image in enumerate(own[:k], 1) if image in relevant), k + 1) for own in complete]
    assert scores.first_positions.tolist() == first
    assert scores.num_missing_queries == rankings.count(None)
    for query, value in zip(scores.query_names, scores.average_precisions, strict=True):
        assert average_precision_at_k(predictions.get(query, []), set(images[query]), k) == value


def test_the_mean_counts_a_query_that_the_submission_leaves_out() -> None:
    queries = [numbered_id(number) for number in range(4)]
    solution = retrieval_solution({query: [numbered_id(9)] for query in queries})
    scores = score_retrieval({queries[2]: [numbered_id(9)]}, solution)
    assert scores.mean_average_precision() == 0.25
    assert scores.num_missing_queries == 3
    assert scores.average_precisions.tolist() == [0, 0, 1, 0]


def test_a_usage_without_queries_is_refused() -> None:
    query = numbered_id(0)
    retrieval = score_retrieval({}, retrieval_solution({query: [query]}))
    recognition = score_recognition({}, recognition_solution({query: [1]}))
    for scores in (retrieval, recognition):
        with pytest.raises(ValueError, match="no Private query"):
            scores.of_usage("Private")


def test_predictions_for_unknown_queries_are_refused() -> None:
    known, unknown = numbered_id(0), numbered_id(1)
    with pytest.raises(ValueError, match=unknown):
        score_retrieval({unknown: []}, retrieval_solution({known: [known]}))
    with pytest.raises(ValueError, match=unknown):
        score_recognition({unknown: None}, recognition_solution({known: [1]}))


def test_a_solution_that_scores_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="scored"):
        score_retrieval({}, retrieval_solution({}))
    with pytest.raises(ValueError, match="relevant image"):
        score_retrieval({}, retrieval_solution({numbered_id(0): []}))
    with pytest.raises(ValueError, match="scored"):
        score_recognition({}, recognition_solution({}))


# Recognition


def defined_gap(ranked_correct: Sequence[bool], num_with_landmark: int) -> float:
    """The oracle: 1 / images with a landmark times the sum of precision(i) where the i-th prediction is right."""
    total = sum(sum(ranked_correct[:i]) / i for i in range(1, len(ranked_correct) + 1) if ranked_correct[i - 1])
    return total / num_with_landmark


# Per image: the landmark that it shows, if any, and the prediction, if any: few confidences, so that there are ties.
RECOGNITION_CASES = st.lists(
    st.tuples(
        st.none() | st.integers(0, 1), st.none() | st.tuples(st.integers(0, 1), st.sampled_from([-1.0, 0.5, 2.0]))
    ),
    min_size=1,
    max_size=6,
).filter(lambda images: any(landmark is not None for landmark, _ in images))


@settings(max_examples=150, deadline=None)
@given(images=RECOGNITION_CASES, seed=st.integers(0, 100))
def test_gap_equals_the_definition_under_every_tie_rule(
    images: list[tuple[int | None, tuple[int, float] | None]], seed: int
) -> None:
    # Names in another order than the solution's rows, so that the tie rule cannot pass by chance.
    names = [numbered_id(int(number)) for number in np.random.default_rng(seed).permutation(len(images))]
    solution = recognition_solution(
        {name: [] if landmark is None else [landmark] for name, (landmark, _) in zip(names, images, strict=True)}
    )
    predictions = {name: prediction for name, (_, prediction) in zip(names, images, strict=True)}
    scores = score_recognition(predictions, solution)
    num_with_landmark = sum(landmark is not None for landmark, _ in images)

    given = [
        (-prediction[1], name, prediction[0] == landmark)
        for name, (landmark, prediction) in zip(names, images, strict=True)
        if prediction is not None
    ]
    official = defined_gap([correct for _, _, correct in sorted(given)], num_with_landmark)
    assert scores.global_average_precision() == pytest.approx(official, abs=1e-12)

    orders = [order for order in itertools.permutations(given) if [o[0] for o in order] == sorted(o[0] for o in order)]
    possible = [defined_gap([correct for _, _, correct in order], num_with_landmark) for order in orders]
    assert scores.global_average_precision(ties="optimistic") == pytest.approx(max(possible), abs=1e-12)
    assert scores.global_average_precision(ties="pessimistic") == pytest.approx(min(possible), abs=1e-12)
    assert scores.tie_gap() == pytest.approx(max(possible) - min(possible), abs=1e-12)

    forgiving = sorted(entry for entry in given if solution.landmarks[entry[1]])
    expected = defined_gap([correct for _, _, correct in forgiving], num_with_landmark)
    assert scores.of_queries_with_landmark().global_average_precision() == pytest.approx(expected, abs=1e-12)
    assert scores.top1_accuracy() == pytest.approx(sum(correct for _, _, correct in given) / num_with_landmark)


def scored_recognition(correct: Sequence[bool], confidences: Sequence[float]) -> RecognitionScores:
    names = [numbered_id(number) for number in range(len(correct))]
    solution = recognition_solution({name: [1] for name in names})
    return score_recognition(
        {name: (int(c), confidence) for name, c, confidence in zip(names, correct, confidences, strict=True)}, solution
    )


def test_equal_confidences_leave_a_gap_and_distinct_ones_none() -> None:
    # Right, then wrong: (1/1) / 2. Wrong, then right: (1/2) / 2.
    assert scored_recognition([True, False], [3.0, 3.0]).tie_gap() == pytest.approx(0.25)
    assert scored_recognition([False, True], [3.0, 3.0]).global_average_precision() == pytest.approx(0.25)
    assert scored_recognition([True, False], [3.0, 2.0]).tie_gap() == 0


def test_public_and_private_gap_are_ranked_apart() -> None:
    first, second = numbered_id(0), numbered_id(1)
    solution = RecognitionSolution(
        usages={first: "Public", second: "Private"}, landmarks={first: frozenset(), second: frozenset({1})}
    )
    scores = score_recognition({first: (1, 9.0), second: (1, 1.0)}, solution)
    assert scores.global_average_precision() == 0.5
    assert scores.of_usage("Private").global_average_precision() == 1
    assert np.isnan(scores.of_usage("Public").global_average_precision())


def test_predictions_for_ignored_images_do_not_count() -> None:
    scored, ignored = numbered_id(0), numbered_id(1)
    solution = RecognitionSolution({scored: "Public", ignored: "Ignored"}, {scored: frozenset({1})})
    scores = score_recognition({scored: (1, 0.5), ignored: (7, 9.0)}, solution)
    assert scores.query_names == (scored,)
    assert scores.global_average_precision() == 1


def test_no_landmark_predicted_is_no_prediction_and_not_missing() -> None:
    answered, empty, missing = (numbered_id(number) for number in range(3))
    solution = recognition_solution({answered: [1], empty: [2], missing: [3]})
    scores = score_recognition({answered: (1, 0.5), empty: None}, solution)
    assert scores.global_average_precision() == pytest.approx(1 / 3)
    assert scores.is_missing.tolist() == [False, False, True]


def test_a_confidence_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        scored_recognition([True], [float("nan")])


def test_values_per_query_can_be_resampled() -> None:
    scores = scored_recognition([True, False, True, True], [4.0, 3.0, 2.0, 1.0])
    estimate = bootstrap_mean(scores.gap_values(), np.arange(4))
    assert estimate.mean == pytest.approx(scores.global_average_precision())
    assert 0 <= estimate.low < estimate.mean < estimate.high <= 1


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), num_queries=st.integers(0, 5), k=st.integers(1, 8))
def test_neighbours_vote_as_counted_one_by_one(seed: int, num_queries: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    landmarks = generator.integers(-1, 4, (num_queries, k))
    # Eighths add up exactly, so that ties are ties.
    scores = (generator.integers(-4, 9, (num_queries, k)) / 8).astype(np.float32)
    scores[landmarks < 0] = np.nan
    recognised = recognise(landmarks, scores)
    for row in range(num_queries):
        votes: dict[int, float] = {}  # keeps the order of the first vote, as max does among equals
        for landmark, score in zip(landmarks[row].tolist(), scores[row].tolist(), strict=True):
            if landmark >= 0:
                votes[landmark] = votes.get(landmark, 0.0) + score
        if votes:
            winner = max(votes, key=lambda landmark: votes[landmark])
            assert (recognised.landmarks[row], recognised.confidences[row]) == (winner, votes[winner])
        else:
            assert recognised.landmarks[row] == -1
            assert np.isnan(recognised.confidences[row])


def test_two_good_neighbours_outvote_the_best_one() -> None:
    recognised = recognise(np.array([[5, 7, 7]]), np.array([[0.9, 0.6, 0.5]], np.float32))
    assert recognised.landmarks.tolist() == [7]
    assert recognised.confidences[0] == pytest.approx(1.1)


def test_votes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        recognise(np.array([[5]]), np.array([[np.nan]], np.float32))
    with pytest.raises(ValueError, match="k is 0"):
        recognise(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.float32))


# Files

Q, I = "0123456789abcdef", "fedcba9876543210"  # noqa: E741
QUERIES = {Q}


def read_submitted_images(file: Path) -> object:
    return read_retrieval_submission(file, QUERIES)


def read_submitted_landmarks(file: Path) -> object:
    return read_recognition_submission(file, QUERIES)


@pytest.mark.parametrize(
    ("read", "text", "line", "complaint"),
    [
        (read_retrieval_solution, "", 1, "header"),
        (read_retrieval_solution, f"id,images\n{Q},{I}\n", 1, "header"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},{I}\n", 2, "3 columns"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},{I},Public,more\n", 2, "3 columns"),
        (read_retrieval_solution, f"id,images,Usage\n\n{Q},{I},public\n", 3, "usage 'public'"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},{I},Public\n{Q},{I},Private\n", 3, "has a row already"),
        (read_retrieval_solution, f"id,images,Usage\n{Q[1:]},{I},Public\n", 2, "no image id"),
        (read_retrieval_solution, f"id,images,Usage\n{Q.upper()},{I},Public\n", 2, "no image id"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},{I}{I},Public\n", 2, "no image id"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},None,Public\n", 2, "'None' is no image id"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},,Public\n", 2, "no images"),
        (read_retrieval_solution, f"id,images,Usage\n{Q},{I} {I},Public\n", 2, "twice"),
        (read_recognition_solution, f"id,images,Usage\n{Q},1,Public\n", 1, "header"),
        (read_recognition_solution, f"id,landmarks,Usage\n{Q},one,Public\n", 2, "no landmark"),
        (read_recognition_solution, f"id,landmarks,Usage\n{Q},-1,Public\n", 2, "no landmark"),
        (read_recognition_solution, f"id,landmarks,Usage\n{Q},1 1,Public\n", 2, "twice"),
        (read_submitted_images, f"id,landmarks\n{Q},{I}\n", 1, "header"),
        (read_submitted_images, f"id,images\n{I},{I}\n", 2, "not in the solution"),
        (read_submitted_images, f"id,images\n{Q},{I}\n{Q},\n", 3, "has a row already"),
        (read_submitted_images, f"id,images\n{Q},{I} {I}0\n", 2, "no image id"),
        (read_submitted_images, f"id,images\n{Q},{I}.jpg\n", 2, "no image id"),
        (read_submitted_landmarks, f"id,images\n{Q},1 0.5\n", 1, "header"),
        (read_submitted_landmarks, f"id,landmarks\n{I},1 0.5\n", 2, "not in the solution"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},1\n", 2, "found 1 values"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},1 0.5 2 0.4\n", 2, "found 4 values"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},1 nan\n", 2, "not a finite number"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},1 inf\n", 2, "not a finite number"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},1 high\n", 2, "not a finite number"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},1.5 0.5\n", 2, "no landmark"),
        (read_submitted_landmarks, f"id,landmarks\n{Q},{'9' * 19} 0.5\n", 2, "no landmark"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, read: Callable[[Path], object], text: str, line: int, complaint: str
) -> None:
    with pytest.raises(DataError, match=rf"rows\.csv, line {line}: .*{complaint}"):
        read(file_with(tmp_path, text))


@pytest.mark.parametrize("read", [read_retrieval_solution, read_recognition_solution, read_submitted_images])
def test_an_unreadable_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(DataError, match=r"absent\.csv cannot be read"):
        read(tmp_path / "absent.csv")
    file = tmp_path / "pixels.csv"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match=r"pixels\.csv cannot be read"):
        read(file)


def test_a_solution_of_ignored_images_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing can be scored"):
        read_retrieval_solution(file_with(tmp_path, f"id,images,Usage\n{Q},None,Ignored\n"))
    with pytest.raises(DataError, match="nothing can be scored"):
        read_recognition_solution(file_with(tmp_path, f"id,landmarks,Usage\n{Q},,Ignored\n"))


def test_a_list_longer_than_the_field_limit_of_the_csv_module_is_read(tmp_path: Path) -> None:
    images = [numbered_id(number) for number in range(10_000)]
    text = f"id,images,Usage\n{Q},{' '.join(images)},Private\n"
    assert len(text) > 131_072
    assert read_retrieval_solution(file_with(tmp_path, text)).relevant == {Q: frozenset(images)}


def test_byte_order_mark_quotes_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(f'\ufeff"id","images"\r\n"{Q}","{I} {Q}"\r\n'.encode())
    assert read_submitted_images(file) == {Q: (I, Q)}


@settings(max_examples=60, deadline=None)
@given(rankings=st.dictionaries(IMAGE_IDS, st.lists(IMAGE_IDS, max_size=100).map(tuple), max_size=4))
def test_a_written_retrieval_submission_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, rankings: dict[str, tuple[str, ...]]
) -> None:
    file = tmp_path_factory.mktemp("submission") / "submission.csv"
    write_retrieval_submission(file, rankings)
    assert file.read_text().splitlines()[0] == "id,images"
    assert read_retrieval_submission(file, rankings) == rankings
    assert list(file.parent.iterdir()) == [file]


@settings(max_examples=60, deadline=None)
@given(
    predictions=st.dictionaries(
        IMAGE_IDS,
        st.none() | st.tuples(st.integers(0, 10**18 - 1), st.floats(allow_nan=False, allow_infinity=False)),
        max_size=4,
    )
)
def test_a_written_recognition_submission_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, predictions: dict[str, tuple[int, float] | None]
) -> None:
    file = tmp_path_factory.mktemp("submission") / "submission.csv"
    write_recognition_submission(file, predictions)
    assert file.read_text().splitlines()[0] == "id,landmarks"
    assert read_recognition_submission(file, predictions) == predictions


def test_what_recognise_finds_can_be_submitted(tmp_path: Path) -> None:
    landmarks, similarities = np.array([[5, 7, 7], [-1, -1, -1]]), np.array([[0.75, 0.5, 0.5], [0, 0, 0]], np.float32)
    file = tmp_path / "submission.csv"
    write_recognition_submission(file, recognise(landmarks, similarities).as_predictions([Q, I]))
    assert file.read_text() == f"id,landmarks\n{Q},7 1.0\n{I},\n"


def test_what_no_submission_may_hold_is_refused_and_not_written(tmp_path: Path) -> None:
    file = file_with(tmp_path, "before")
    for rankings, complaint in (
        ({Q: [numbered_id(number) for number in range(101)]}, "101 images"),
        ({Q: [f"{I}.jpg"]}, "no image id"),
        ({"query": [I]}, "no image id"),
    ):
        with pytest.raises(ValueError, match=complaint):
            write_retrieval_submission(file, rankings)
    for prediction in ((1, float("nan")), (1, float("inf")), (-1, 0.5), (10**18, 0.5)):
        with pytest.raises(ValueError, match="give None"):
            write_recognition_submission(file, {Q: prediction})
    with pytest.raises(ValueError, match="no image id"):
        write_recognition_submission(file, {"query": None})
    assert file.read_text() == "before"
