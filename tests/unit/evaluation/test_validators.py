import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from evaluation import validators
from evaluation.record import PictureCounts
from evaluation.result import Result, Section, result_tree
from evaluation.revisited.ground_truth import SETUPS, GroundTruth, Setup, load_ground_truth
from evaluation.validators import (
    duplicates,
    effect_of_duplicates,
    has_copy,
    has_twin,
    impossible_values,
    landmark_overlap,
    missing_pictures,
    norms,
    precision,
    recall_ceiling,
    row_hashes,
    share_of_copies,
    training_overlap,
)
from lookalike.errors import DataError
from lookalike.ranking_metrics import landmark_metrics, measure
from tests.drawn_pictures import draw_class_folders

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "revisited"
SECTION = {"E": "easy", "M": "medium", "H": "hard"}

# Percent, as their authors published them: mP@{1, 5, 10} of the example features of the benchmark, of DELG and of
# SOLAR with a million distractors; mR@{1, 5, 10} of DELG.
PUBLISHED_PRECISIONS = {
    "roxford5k": [
        ("E", (97.06, 92.06, 86.49)),
        ("M", (97.14, 90.67, 84.67)),
        ("H", (81.43, 63.00, 53.00)),
        ("H", (85.71, 72.29, 60.14)),
        ("M", (95.71, 92.0, 86.86)),
        ("E", (88.24, 81.99, 76.96)),
        ("M", (88.57, 82.29, 76.71)),
        ("H", (74.29, 58.29, 48.86)),
    ],
    "rparis6k": [
        ("E", (100, 97.14, 96.14)),
        ("M", (100, 98.86, 98.14)),
        ("H", (94.29, 90.29, 89.14)),
    ],
}
PUBLISHED_RECALLS = [("H", (19.15, 29.72, 36.32)), ("M", (10.17, 25.94, 33.83))]


@pytest.fixture(scope="module")
def truths() -> dict[str, GroundTruth]:
    return {name: load_ground_truth(GOLDEN / f"gnd_{name}.pkl") for name in PUBLISHED_PRECISIONS}


def unit_rows(num_rows: int, dim: int = 24, *, seed: int = 0) -> ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rounded_to_bfloat16(rows: ndarray) -> ndarray:
    return ((rows.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("rows", [unit_rows(50), unit_rows(50).astype(np.float16), rounded_to_bfloat16(unit_rows(50))])
def test_unit_vectors_of_any_precision_have_no_norm_warning(rows: ndarray) -> None:
    assert norms("queries", rows) == []


def test_vectors_that_are_not_of_unit_length_are_counted() -> None:
    rows = unit_rows(40)
    rows[7] *= 1.5
    (warning,) = norms("gallery", rows)
    assert warning.startswith("gallery: 2.5% of 40 vectors are not of unit length (off by up to 0.5)")
    assert "Divide each vector" in warning


@pytest.mark.parametrize("value", [np.nan, np.inf, np.float32(3e38)])
def test_vectors_without_a_length_are_not_of_unit_length(value: float) -> None:
    rows = unit_rows(4)
    rows[2] = value
    assert "25% of 4 vectors" in norms("queries", rows)[0]


def test_long_files_are_sampled_evenly_and_the_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validators, "MAX_SAMPLED_ROWS", 100)
    monkeypatch.setattr(validators, "_ROWS_AT_A_TIME", 7)
    rows = unit_rows(1000)
    rows[500:] *= 2
    np.save(tmp_path / "rows.npy", rows)
    (warning,) = norms("gallery", np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert "50% of 100 vectors, spread evenly over all 1,000, are not of unit length" in warning
    parts = [np.load(tmp_path / "rows.npy", mmap_mode="r"), rows[:0], unit_rows(200)]
    assert "41% of 100 vectors, spread evenly over all 1,200," in norms("gallery", *parts)[0]


@given(sizes=st.lists(st.integers(0, 40), max_size=4), limit=st.integers(2, 30))
def test_a_sample_has_distinct_rows_from_the_first_to_the_last(sizes: list[int], limit: int) -> None:
    rows = np.arange(sum(sizes), dtype=np.float32)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validators, "MAX_SAMPLED_ROWS", limit)
        patch.setattr(validators, "_ROWS_AT_A_TIME", 4)
        blocks = [block[:, 0] for block in validators._sampled_blocks(np.split(rows, np.cumsum(sizes)[:-1]))]
    found = np.concatenate([np.zeros(0, np.float32), *blocks])
    assert len(found) == min(len(rows), limit)
    assert (np.diff(found) > 0).all()
    if len(found) > 1:
        assert (found[0], found[-1]) == (0, len(rows) - 1)
        assert np.diff(found).max() - np.diff(found).min() <= 1


def test_rounded_vectors_are_told_from_float32() -> None:
    rows = unit_rows(30)
    assert precision("queries", rows) == []
    assert "bfloat16" in precision("queries", rounded_to_bfloat16(rows))[0]
    for coarse in (rows.astype(np.float16), rows.astype(np.float16).astype(np.float32)):
        (note,) = precision("queries", coarse)
        assert "float16 numbers, of 11 significant bits" in note
    mixed = rounded_to_bfloat16(rows)
    mixed[17, 3] = np.float32(1 / 3)
    assert precision("queries", mixed) == []
    assert precision("queries", rows[:0]) == []
    with_large = rows.astype(np.float16).astype(np.float32)
    with_large[0, 0] = 1e30
    assert precision("queries", with_large) == []


def test_copies_are_those_that_a_comparison_of_all_pairs_finds() -> None:
    random = np.random.default_rng(3)
    rows = unit_rows(40)[random.integers(0, 40, 90)]
    gallery = np.concatenate([unit_rows(10, seed=1), rows[:5]])
    hashes = row_hashes(rows)
    equal = (rows[:, None] == rows[None]).all(axis=2)
    is_earlier = np.tril(np.ones((90, 90), bool), -1)
    assert share_of_copies(hashes) == pytest.approx((equal & is_earlier).any(axis=1).mean())
    np.testing.assert_array_equal(has_twin(hashes), (equal & ~np.eye(90, dtype=bool)).any(axis=1))
    expected = (rows[:, None] == gallery[None]).all(axis=2).any(axis=1)
    np.testing.assert_array_equal(has_copy(hashes, row_hashes(gallery)), expected)


def test_hashes_do_not_depend_on_storage_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit_rows(23).astype(np.float16)
    expected = row_hashes(rows.astype(np.float32))
    monkeypatch.setattr(validators, "_ROWS_AT_A_TIME", 5)
    np.save(tmp_path / "rows.npy", np.asfortranarray(rows))
    np.testing.assert_array_equal(row_hashes(np.load(tmp_path / "rows.npy", mmap_mode="r")), expected)
    np.testing.assert_array_equal(row_hashes(rows[:9], rows[:0], rows[9:]), expected)


def test_duplicates_are_warned_about_with_their_share() -> None:
    rows = unit_rows(20)
    assert duplicates("gallery", row_hashes(rows)) == []
    assert duplicates("gallery", row_hashes(rows[:0])) == []
    rows[[4, 9]] = rows[1]
    (warning,) = duplicates("gallery", row_hashes(rows))
    assert "10% of 20 vectors are bit for bit copies" in warning


def test_one_copy_among_a_million_is_not_shown_as_none() -> None:
    hashes = np.arange(1_000_000, dtype=np.uint64)
    hashes[-1] = 0
    assert "0.0001% of 1,000,000 vectors" in duplicates("distractors", hashes)[0]


def test_the_effect_of_duplicates_is_the_mean_without_them() -> None:
    values = np.array([1.0, 1.0, 0.0, 1.0, np.nan])
    copied = np.array([True, True, False, False, True])
    (warning,) = effect_of_duplicates("hit_rate@1", values, copied, share=0.125)
    assert "12.5% of the vectors are copies" in warning
    assert "without the 2 of 4 queries that have a copy in the gallery, hit_rate@1 is 50.00 instead of 75.00" in warning
    (warning,) = effect_of_duplicates("hit_rate@1", values, np.ones(5, bool), share=0.5)
    assert "all 4 queries" in warning
    only_unjudged = np.array([False, False, False, False, True])
    assert effect_of_duplicates("hit_rate@1", values, only_unjudged, share=0.1) == []


def test_recall_ceilings_are_those_of_a_perfect_ranking(truths: dict[str, GroundTruth]) -> None:
    known: dict[tuple[str, Setup], tuple[float, ...]] = {
        ("roxford5k", "medium"): (10.30, 27.92, 40.13),
        ("roxford5k", "hard"): (20.45, 42.97, 61.29),
        ("rparis6k", "medium"): (0.56, 2.78, 5.56),
    }
    for (name, setup), values in known.items():
        for k, value in zip((1, 5, 10), values, strict=True):
            assert recall_ceiling(truths[name], setup, k) == pytest.approx(value, abs=0.0051)


def published(name: str) -> list[dict[str, dict[str, float]]]:
    trees = [
        {SECTION[letter]: {f"mP@{k}": value for k, value in zip((1, 5, 10), values, strict=True)}}
        for letter, values in PUBLISHED_PRECISIONS[name]
    ]
    if name == "roxford5k":
        trees += [
            {SECTION[letter]: {f"mR@{k}": value for k, value in zip((1, 5, 10), values, strict=True)}}
            for letter, values in PUBLISHED_RECALLS
        ]
    return trees


@pytest.mark.parametrize("name", PUBLISHED_PRECISIONS)
def test_all_published_numbers_are_possible(name: str, truths: dict[str, GroundTruth]) -> None:
    assert [warning for tree in published(name) for warning in impossible_values(tree, truths[name])] == []


def test_own_results_are_possible_even_where_perfect(truths: dict[str, GroundTruth]) -> None:
    for name, truth in truths.items():
        sections: dict[str, Section] = {}
        for setup in SETUPS:
            positions = [np.arange(labels.is_relevant(setup).sum(), dtype=np.int64) for labels in truth.labels]
            values = measure(landmark_metrics((1, 5, 10)), positions)
            sections[setup] = Section(truth.query_names, np.zeros(len(positions), np.int64), values)
        assert impossible_values(result_tree(Result(name, sections, {})), truth) == []


@pytest.mark.parametrize(
    ("section", "metric", "value", "reason"),
    [
        ("medium", "map", 100.01, "percentages lie in"),
        ("medium", "map", 101, "percentages lie in"),
        ("easy", "map", float("inf"), "percentages lie in"),
        ("medium", "mp@5", -0.1, "percentages lie in"),
        ("anything", "recall@10", 101, "percentages lie in"),
        ("hard", "map", float("nan"), "percentages lie in"),
        ("medium", "mr@1", 10.32, "a perfect ranking has 10.30"),
        ("hard", "mR@10", 74.0, "a perfect ranking has 61.29"),
        ("easy", "mp@1", 97.14, "each of 68 queries .* is 97.06"),  # of 70 queries
        ("medium", "mP@1", 97.06, "each of 70 queries .* is 97.14"),
    ],
)
def test_impossible_numbers_are_named(
    section: str, metric: str, value: float, reason: str, truths: dict[str, GroundTruth]
) -> None:
    (warning,) = impossible_values({section: {metric: value}}, truths["roxford5k"])
    assert warning.startswith(f"{section} {metric} is ")
    assert re.search(reason, warning)


def test_numbers_are_judged_by_the_decimals_they_are_written_with(truths: dict[str, GroundTruth]) -> None:
    truth = truths["roxford5k"]
    assert impossible_values({"medium": {"mp@1": 97.1}}, truth) == []
    assert impossible_values({"medium": {"mp@1": 100 * 68 / 70}}, truth) == []
    assert len(impossible_values({"medium": {"mp@1": 97.1401}}, truth)) == 1


def test_what_is_no_metric_is_passed_over(truths: dict[str, GroundTruth]) -> None:
    tree = {
        "format": 1,
        "sections": ["medium"],
        "medium": {"map": None, "num_queries": 700, "tie_gap": -3.0, "per_query": {"map": [1]}, "mp@1": True},
        "record": {"benchmark": "map", "num_distractors": 1_001_001},
    }
    assert impossible_values(tree, truths["roxford5k"]) == []


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (PictureCounts(4993, 4993, 0), None),
        (PictureCounts(4993, 4993, None), None),
        (PictureCounts(None, 12, 0), None),
        (PictureCounts(None, 12, None), None),
        (PictureCounts(4993, 4990, 3), "4,990 of 4,993 pictures have a vector, 3 are missing, 3 could not be embedded"),
        (PictureCounts(1_001_001, 990_000, None), "990,000 of 1,001,001 pictures have a vector, 11,001 are missing. "),
        (PictureCounts(None, 12, 2), "12 pictures have a vector, 2 could not be embedded"),
        (PictureCounts(70, 72, 0), "72 pictures have a vector, 70 are expected"),
        (PictureCounts(70, 70, 1), "70 pictures have a vector, 1 could not be embedded, 70 are expected"),
    ],
)
def test_missing_pictures_are_counted(counts: PictureCounts, expected: str | None) -> None:
    warnings = missing_pictures({"gallery": counts, "queries": PictureCounts(70, 70, 0)})
    if expected is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(f"gallery: {expected}")


def make_shards(folder: Path, train: range, test: range) -> ShardSet:
    for split, labels in (("train", train), ("test", test)):
        draw_class_folders(folder / "pictures" / split, labels, pictures_per_class=2)
    return write_shards(
        ClassFolders(ClassFoldersSettings(folder=folder / "pictures")), folder / "shards", ShardSettings()
    )


def test_classes_and_pictures_of_training_are_found_in_the_test(tmp_path: Path) -> None:
    with (
        make_shards(tmp_path / "a", range(4), range(4, 6)) as own,
        make_shards(tmp_path / "b", range(9, 10), range(3, 7)) as other,
    ):
        classes, pictures = training_overlap(own, other, training_split="train", split="test")
        assert "1 of 4 (25%) test classes, with 2 of 8 (25%) test pictures," in classes
        assert "class03" in classes
        assert "2 of 8 (25%) test pictures were trained on, byte for byte" in pictures
        assert "class03" in pictures
        assert len(training_overlap(own, other, training_split=None, split="test")) == 2
        assert "3 of 4" in training_overlap(own, other, training_split=None, split="test")[0]
        assert training_overlap(own, own, training_split="train", split="test") == []
        assert training_overlap(own, other, training_split="test", split="train") == []
        with pytest.raises(DataError, match="no split 'nothing'"):
            training_overlap(own, other, training_split="train", split="nothing")


def test_mere_numbers_are_compared_within_one_data_set_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 0), ("b", 50)):
        folder = tmp_path / name / "pictures"
        draw_class_folders(folder, range(seed, seed + 2), pictures_per_class=2)
        for number, class_folder in enumerate(sorted(folder.iterdir())):
            class_folder.rename(folder / str(number))
    sets = [
        write_shards(
            ClassFolders(ClassFoldersSettings(folder=tmp_path / name / "pictures")),
            tmp_path / name / "shards",
            ShardSettings(),
        )
        for name in ("a", "b")
    ]
    with sets[0] as training, sets[1] as test:
        (warning,) = training_overlap(training, test, training_split=None, split=None)
        assert "2 of 2 (100%) test classes" in warning
        monkeypatch.setitem(training.manifest.details, "data_set", {"name": "gldv1"})
        assert training_overlap(training, test, training_split=None, split=None) == []


def test_landmarks_are_found_by_name_however_it_is_written() -> None:
    training = [
        "Category:All_Souls_College,_Oxford",
        "radcliffe camera",
        "Musée d'Orsay",
        "Hertfordshire County Hall",
        "NOTRE-DAME de Paris",
    ]
    tests = ["all_souls", "Radcliffe_Camera", "museedorsay", "hertford", "notredame", "keble"]
    (warning,) = landmark_overlap(training, tests)
    assert warning.startswith("4 of 6 test landmarks")
    assert "all_souls (Category:All_Souls_College,_Oxford)" in warning
    assert landmark_overlap(training, ["hertford", "keble", "souls"]) == []
    assert landmark_overlap([], tests) == []
    assert landmark_overlap(["", "___"], ["", "_"]) == []
