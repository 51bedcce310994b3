import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from evaluation.classes import positions as positions_module
from evaluation.classes.given_rankings import judge_rankings, recall_against_exact
from evaluation.classes.mutual_information import normalized_mutual_information
from evaluation.classes.pictures import checked_pictures
from evaluation.classes.positions import Ties, place_relevant, queries_at_a_time, settle_near_ties
from evaluation.classes.protocols import leave_one_out, query_gallery, random_gallery
from evaluation.result import Section
from lookalike.errors import DataError, ResourceError
from lookalike.exact_search import exact_scores, exact_search
from lookalike.ranking_metrics import precision_at_recall

KS = (1, 2, 5)


def clustered(
    sizes: Sequence[int], *, dim: int = 6, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors around class centres, shuffled ids, labels."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    vectors = generator.normal(size=(len(sizes), dim))[labels] + noise * generator.normal(size=(len(labels), dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), 10 + 3 * generator.permutation(len(labels)), labels


def slow_metrics(is_relevant: Sequence[bool], ks: Sequence[int]) -> dict[str, float]:
    """The definitions word for word, from a whole ranking."""
    num_relevant = sum(is_relevant)
    found = [sum(is_relevant[: i + 1]) for i in range(len(is_relevant))]
    values = {}
    for k in ks:
        among_first = sum(is_relevant[:k])
        values[f"hit_rate@{k}"] = float(among_first > 0)
        values[f"recall@{k}"] = among_first / num_relevant
        values[f"rs_target@{k}"] = among_first / min(k, num_relevant)
    precisions = [found[i] / (i + 1) if is_relevant[i] else 0.0 for i in range(len(is_relevant))]
    values["map"] = sum(precisions) / num_relevant
    values["map@r"] = sum(precisions[:num_relevant]) / num_relevant
    values["r_precision"] = sum(is_relevant[:num_relevant]) / num_relevant
    return values


def slow_query(
    query: tuple[np.ndarray, int, int], gallery: tuple[np.ndarray, np.ndarray, np.ndarray], ties: Ties
) -> dict[str, float] | None:
    """A full sort in float64; None where nothing is relevant."""
    vector, query_id, label = query
    rows = [i for i in range(len(gallery[1])) if gallery[1][i] != query_id]
    scores = gallery[0].astype(np.float64) @ vector.astype(np.float64)
    is_relevant = gallery[2] == label
    if not is_relevant[rows].any():
        return None
    second = {"index": 0 * scores, "optimistic": ~is_relevant, "pessimistic": is_relevant}[ties]
    ranking = sorted(rows, key=lambda i: (-scores[i], second[i], gallery[1][i]))
    return slow_metrics([bool(is_relevant[i]) for i in ranking], KS)


def require_equal(section: Section, expected: Sequence[dict[str, float] | None]) -> None:
    for name, values in section.per_query.items():
        own = [np.nan if value is None else value[name] for value in expected]
        np.testing.assert_allclose(values, own, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("ties", ["index", "optimistic", "pessimistic"])
def test_leave_one_out_is_a_full_sort_with_ties_copies_and_lonely_pictures(ties: Ties) -> None:
    generator = np.random.default_rng(3)
    labels = generator.permutation(np.repeat(np.arange(12), [1, 1, 2, 2, 3, 4, 5, 7, 9, 12, 20, 1]))
    vectors = generator.integers(-2, 3, (len(labels), 4)).astype(np.float32)  # exact scores, many of them equal
    vectors[5:9] = vectors[0]
    ids = generator.permutation(1000)[: len(labels)]
    section = leave_one_out(vectors, ids, labels, ks=KS, ties=ties)
    pictures = (vectors, ids, labels)
    expected = [slow_query((vectors[i], ids[i], labels[i]), pictures, ties) for i in range(len(labels))]
    assert section.query_names == tuple(str(ids[i]) for i, value in enumerate(expected) if value is not None)
    require_equal(section, [value for value in expected if value is not None])
    assert section.facts["num_gallery"] == 67
    assert section.facts["num_alone"] == 3
    np.testing.assert_array_equal(section.clusters, [labels[i] for i, value in enumerate(expected) if value])


def test_the_tie_gap_is_the_distance_between_the_extreme_rules() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 4)
    vectors = generator.integers(-1, 2, (40, 3)).astype(np.float32)
    best, own, worst = (
        leave_one_out(vectors, np.arange(40), labels, ks=KS, ties=ties)
        for ties in ("optimistic", "index", "pessimistic")
    )
    for name, gap in own.facts["tie_gap"].items():
        assert gap == pytest.approx(100 * (best.mean(name) - worst.mean(name)), abs=1e-9)
        assert gap > 1
        assert worst.mean(name) <= own.mean(name) <= best.mean(name)
    assert list(own.facts["tie_gap"]) == ["map", "hit_rate@1"]
    assert own.facts["ties"] == "index"


def test_average_precision_is_scikit_learns_where_there_are_no_ties() -> None:
    vectors, ids, labels = clustered([7] * 12, dim=16)
    section = leave_one_out(vectors, ids, labels, ks=(1,))
    scores = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    expected = []
    for query in range(len(labels)):
        others = np.arange(len(labels)) != query
        expected.append(average_precision_score(labels[others] == labels[query], scores[query, others]))
    np.testing.assert_allclose(section.per_query["map"], expected, atol=1e-12)


@pytest.mark.parametrize("num_relevant", [1, 3, 40, 200])
@pytest.mark.parametrize("num_gallery", [250, 60_000])
def test_positions_are_those_of_a_sort_however_many_are_relevant(num_relevant: int, num_gallery: int) -> None:
    generator = np.random.default_rng(num_relevant)
    scores = np.round(generator.normal(size=num_gallery), 2).astype(np.float32)
    ids = generator.permutation(num_gallery)
    relevant = generator.choice(num_gallery, num_relevant, replace=False)
    is_relevant = np.isin(np.arange(num_gallery), relevant)
    rules: dict[Ties, np.ndarray] = {
        "index": np.lexsort((ids, -scores)),
        "optimistic": np.lexsort((~is_relevant, -scores)),
        "pessimistic": np.lexsort((is_relevant, -scores)),
    }
    placement = place_relevant(scores.copy(), ids, relevant)
    for ties, order in rules.items():
        np.testing.assert_array_equal(placement.positions(ties), np.flatnonzero(is_relevant[order]), err_msg=ties)


@pytest.mark.parametrize("num_relevant", [1, 5, 150])
def test_how_a_product_rounds_moves_no_position(num_relevant: int) -> None:
    """Scores anywhere within the error give the placement of the exact ones: among copies, which must tie, too."""
    vectors, ids, labels = clustered([500], dim=12, noise=0.5)
    vectors[250:] = vectors[:250]
    gallery = checked_pictures("gallery", vectors, ids, labels)
    generator, error = np.random.default_rng(num_relevant), 1e-3
    relevant = generator.choice(len(ids), num_relevant, replace=False)
    exact = exact_scores(np.repeat(vectors[:1], len(ids), axis=0), vectors)
    exact[7] = -np.inf
    expected = place_relevant(exact.copy(), ids, relevant)
    scores = exact + generator.uniform(-0.99 * error, 0.99 * error, len(ids)).astype(np.float32)
    settle_near_ties(scores, vectors[0], gallery, relevant[relevant != 7], error=error)
    found = place_relevant(scores, ids, relevant)
    for name in ("num_above", "num_tied", "num_tied_before"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_dropping_the_first_hit_is_wrong_where_the_gallery_holds_copies() -> None:
    """The usual shortcut, a search for k + 1 without its first column, against the removal by id."""
    vectors, ids, labels = clustered([4] * 60, noise=1.5)
    generator = np.random.default_rng(1)
    overwritten = generator.choice(len(vectors), 24, replace=False)
    vectors[overwritten] = vectors[generator.choice(len(vectors), 24, replace=False)]
    ranked = exact_search(vectors, vectors, ids, k=2).ids
    label_of = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    shortcut = [float(label_of[int(second)] == label) for second, label in zip(ranked[:, 1], labels, strict=True)]
    pictures = (vectors, ids, labels)
    exact = [slow_query((vectors[i], ids[i], labels[i]), pictures, "index") for i in range(len(labels))]
    own = leave_one_out(vectors, ids, labels, ks=(1,)).mean("hit_rate@1")
    assert own == pytest.approx(np.mean([value["hit_rate@1"] for value in exact if value]), abs=1e-12)
    assert np.mean(shortcut) > own + 0.01
    unharmed = clustered([4] * 60, noise=1.5)
    ranked = exact_search(unharmed[0], unharmed[0], ids, k=2).ids
    shortcut = [float(label_of[int(second)] == label) for second, label in zip(ranked[:, 1], labels, strict=True)]
    assert leave_one_out(*unharmed, ks=(1,)).mean("hit_rate@1") == pytest.approx(np.mean(shortcut), abs=1e-12)


@pytest.mark.parametrize("ties", ["index", "optimistic", "pessimistic"])
def test_query_gallery_is_a_full_sort_and_counts_what_cannot_be_answered(ties: Ties) -> None:
    generator = np.random.default_rng(5)
    queries = (generator.integers(-1, 2, (30, 3)).astype(np.float32), np.arange(30), generator.integers(0, 12, 30))
    gallery = (
        generator.integers(-1, 2, (50, 3)).astype(np.float32),
        generator.permutation(np.arange(20, 70)),  # ten ids are queries, too
        generator.integers(0, 10, 50),
    )
    section = query_gallery(*queries, *gallery, ks=KS, ties=ties, names=[f"q{i}" for i in range(30)])
    expected = [slow_query(query, gallery, ties) for query in zip(*queries, strict=True)]
    require_equal(section, expected)
    assert section.facts["num_unanswerable"] == sum(value is None for value in expected) > 0
    assert section.facts["num_in_gallery_too"] == 10
    assert section.query_names[:2] == ("q0", "q1")


def test_random_gallery_holds_one_picture_per_class_and_averages_over_seeds() -> None:
    vectors, ids, labels = clustered([1, 2, 5, 8, 3], dim=4)
    names = [f"p{own}" for own in ids]
    section = random_gallery(vectors, ids, labels, ks=(1, 2), num_seeds=4, names=names)
    assert section.facts["num_gallery"] == 5
    assert section.facts["num_queries_per_seed"] == 14
    assert len(section.query_names) == 4 * 14
    galleries = []
    for seed in range(4):
        queries = {name.split("/")[1] for name in section.query_names if name.startswith(f"{seed}/")}
        chosen = np.array([name not in queries for name in names])
        assert sorted(labels[chosen]) == [0, 1, 2, 3, 4]
        galleries.append(tuple(ids[chosen]))
        gallery = (vectors[chosen], ids[chosen], labels[chosen])
        for row in np.flatnonzero(~chosen):
            expected = slow_query((vectors[row], ids[row], labels[row]), gallery, "index")
            place = section.query_names.index(f"{seed}/{names[row]}")
            assert expected is not None
            assert section.per_query["hit_rate@1"][place] == expected["hit_rate@1"]
            assert section.clusters[place] == labels[row]
    assert len(set(galleries)) > 1
    per_seed = section.facts["per_seed"]["hit_rate@1"]
    assert np.mean(per_seed) == pytest.approx(100 * section.mean("hit_rate@1"))
    assert section.facts["deviation_over_seeds"]["hit_rate@1"] == pytest.approx(np.std(per_seed, ddof=1))
    assert random_gallery(vectors, ids, labels, ks=(1,), num_seeds=1).facts["deviation_over_seeds"] == {
        "hit_rate@1": None
    }


def test_the_two_protocols_of_one_data_set_differ_widely() -> None:
    """On vectors with two views per class: a query may find its own view by itself, but not in a gallery of one."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 8)
    views = 2 * labels + generator.integers(0, 2, 800)
    centers = generator.normal(size=(100, 16)).repeat(2, axis=0) + generator.normal(size=(200, 16))
    vectors = centers[views] + 0.3 * generator.normal(size=(800, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    alone = leave_one_out(vectors, np.arange(800), labels, ks=(1,))
    drawn = random_gallery(vectors, np.arange(800), labels, ks=(1,), num_seeds=3)
    assert alone.mean("hit_rate@1") > drawn.mean("hit_rate@1") + 0.1
    assert len(alone.query_names) == 800
    assert drawn.facts["num_queries_per_seed"] == 700


def test_every_picture_of_a_class_is_chosen_about_as_often() -> None:
    vectors, ids, labels = clustered([4] * 40)
    section = random_gallery(vectors, ids, labels, ks=(1,), num_seeds=20)
    _, times_query = np.unique([name.split("/")[1] for name in section.query_names], return_counts=True)
    times_chosen = 20 - np.concatenate([times_query, np.zeros(len(ids) - len(times_query), int)])
    assert times_chosen.mean() == 5
    # Binomial(20, 1/4): the variance is 3.75; the standard error over 160 pictures is about 0.42.
    assert times_chosen.var() == pytest.approx(3.75, abs=1.7)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_mapped_file_gives_the_same(dtype: type, tmp_path: Path) -> None:
    vectors, ids, labels = clustered([5] * 30)
    np.save(tmp_path / "vectors.npy", vectors.astype(dtype))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    own = leave_one_out(mapped, ids, labels, ks=KS)
    loaded = leave_one_out(vectors.astype(dtype).astype(np.float32), ids, labels, ks=KS)
    for name, values in own.per_query.items():
        np.testing.assert_array_equal(values, loaded.per_query[name])


def test_values_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids, labels = clustered([9] * 20, dim=33)
    whole = leave_one_out(vectors, ids, labels, ks=KS)
    monkeypatch.setattr(positions_module, "_BYTES_OF_SCORES", 1)
    monkeypatch.setattr(positions_module, "_GALLERY_ROWS", 64)
    assert queries_at_a_time(180) == 16
    small = leave_one_out(vectors, ids, labels, ks=KS)
    for name, values in whole.per_query.items():
        np.testing.assert_array_equal(values, small.per_query[name])


@pytest.mark.parametrize(
    ("num_gallery", "expected"), [(0, 256), (100, 256), (60_502, 256), (136_093, 128), (10**9, 16)]
)
def test_a_block_of_scores_stays_small(num_gallery: int, expected: int) -> None:
    assert queries_at_a_time(num_gallery) == expected


def test_a_list_decides_what_it_can_and_bounds_the_rest() -> None:
    vectors, ids, labels = clustered([4] * 20)
    whole = leave_one_out(vectors, ids, labels, ks=(1, 2, 5))
    ranked = exact_search(vectors, vectors, ids, k=4).ids  # the query itself is in it: three others at least
    section = judge_rankings(ranked, ids, labels, ids, labels, ks=(1, 2, 5))
    assert section.query_names == whole.query_names
    assert set(section.per_query) >= {"hit_rate@1", "hit_rate@2", "recall@2", "rs_target@2", "map@r", "r_precision"}
    assert {"hit_rate@5", "map"} <= set(section.bounds)
    assert {*section.per_query, *section.bounds} == set(whole.per_query)
    for name, values in section.per_query.items():
        np.testing.assert_array_equal(values, whole.per_query[name], err_msg=name)
    for name, extremes in section.bounds.items():
        assert (extremes[:, 0] <= whole.per_query[name]).all(), name
        assert (whole.per_query[name] <= extremes[:, 1]).all(), name


def test_a_whole_ranking_decides_everything() -> None:
    vectors, ids, labels = clustered([1, 3, 6, 10])
    whole = leave_one_out(vectors, ids, labels, ks=KS)
    ranked = exact_search(vectors, vectors, ids, k=len(ids), excluded_ids=ids).ids
    section = judge_rankings(ranked, ids, labels, ids, labels, ks=KS)
    assert not section.bounds
    assert section.facts["num_unanswerable"] == 1
    for name, values in section.per_query.items():
        np.testing.assert_array_equal(values[~np.isnan(values)], whole.per_query[name], err_msg=name)


def test_lists_that_cannot_be_judged_are_refused() -> None:
    ids, labels = np.arange(4), np.array([0, 0, 1, 1])
    ranked = np.array([[1], [0], [3], [2]])
    judge_rankings(ranked, ids, labels, ids, labels, ks=(1,))
    with pytest.raises(DataError, match="does not hold: 9"):
        judge_rankings(np.where(ranked == 3, 9, ranked), ids, labels, ids, labels, ks=(1,))
    with pytest.raises(DataError, match="query 0: the ranking names an id twice"):
        judge_rankings(np.repeat(ranked, 2, axis=1), ids, labels, ids, labels, ks=(1,))
    with pytest.raises(DataError, match="expected 4 rows"):
        judge_rankings(ranked[:2], ids, labels, ids, labels, ks=(1,))
    with pytest.raises(DataError, match="1 names for 4"):
        judge_rankings(ranked, ids, labels, ids, labels, ks=(1,), names=["a"])
    with pytest.raises(DataError, match="no query has a picture"):
        judge_rankings(ranked, ids, labels + 5, ids, labels, ks=(1,))


def test_recall_against_exact_is_the_share_of_found_neighbours() -> None:
    exact = np.array([[1, 2, 3], [4, 5, -1]])
    assert recall_against_exact(np.array([[3, 1, 9, 2], [5, 4, -1, -1]]), exact) == 4 / 5
    assert recall_against_exact(exact, exact) == 1
    with pytest.raises(ValueError, match="rankings of 2"):
        recall_against_exact(exact[:, :2], exact)
    with pytest.raises(ValueError, match="no exact neighbours"):
        recall_against_exact(exact, np.full((2, 3), -1))


def test_pictures_that_cannot_be_judged_are_refused_by_name() -> None:
    vectors, ids, labels = clustered([3, 3])
    broken = vectors.copy()
    broken[4] = np.nan
    names = [f"p{i}" for i in range(6)]
    with pytest.raises(DataError, match="pictures: 1 vectors hold NaN or infinity: p4"):
        leave_one_out(broken, ids, labels, ks=KS, names=names)
    with pytest.raises(DataError, match="hold NaN or infinity: p0, p1, p2, p3, p4 and 1 more"):
        leave_one_out(vectors.astype(np.float64) * 1e300, ids, labels, ks=KS, names=names)
    broken[4] = 1e30
    with pytest.raises(DataError, match=r"p4 has length .*overflow"):
        leave_one_out(broken, ids, labels, ks=KS, names=names)
    with pytest.raises(DataError, match="6 vectors, but 5 ids"):
        leave_one_out(vectors, ids[:5], labels[:5], ks=KS)
    with pytest.raises(DataError, match="6 ids, but 5 labels"):
        leave_one_out(vectors, ids, labels[:5], ks=KS)
    with pytest.raises(DataError, match="and 2 names"):
        leave_one_out(vectors, ids, labels, ks=KS, names=names[:2])
    with pytest.raises(DataError, match=r"expected rows of floats, found int64 of shape \(6, 6\)"):
        checked_pictures("pictures", vectors.astype(np.int64), ids, labels)
    with pytest.raises(DataError, match=r"expected rows of floats, found float32 of shape \(36,\)"):
        checked_pictures("pictures", vectors.ravel(), ids, labels)
    with pytest.raises(DataError, match="labels must be whole numbers, found float64"):
        checked_pictures("pictures", vectors, ids, labels / 2)
    with pytest.raises(DataError, match="more often: 7"):
        leave_one_out(vectors, np.array([7, 7, 1, 2, 3, 4]), labels, ks=KS)
    with pytest.raises(DataError, match="must not be negative, found -1"):
        leave_one_out(vectors, np.array([-1, 7, 1, 2, 3, 4]), labels, ks=KS)
    with pytest.raises(DataError, match=r"1 pictures have no class.*ids 40"):
        leave_one_out(vectors, np.array([40, 1, 2, 3, 4, 5]), np.array([-1, 0, 0, 0, 1, 1]), ks=KS)
    with pytest.raises(DataError, match="no class has two"):
        leave_one_out(vectors, ids, np.arange(6), ks=KS)
    with pytest.raises(DataError, match="no class has two"):
        random_gallery(vectors, ids, np.arange(6), ks=KS)
    with pytest.raises(DataError, match="there are no pictures"):
        leave_one_out(vectors[:0], ids[:0], labels[:0], ks=KS)
    with pytest.raises(DataError, match="queries have 6 dimensions, the gallery 3"):
        query_gallery(vectors, ids, labels, vectors[:, :3], ids, labels, ks=KS)
    with pytest.raises(DataError, match=r"no query has a picture.*classes 5, 6 search among 0, 1"):
        query_gallery(vectors, ids, labels + 5, vectors, ids, labels, ks=KS)
    for ks in ((), (0,), (1, 1)):
        with pytest.raises(ValueError, match="ks must be"):
            leave_one_out(vectors, ids, labels, ks=ks)
    with pytest.raises(ValueError, match="num_seeds"):
        random_gallery(vectors, ids, labels, ks=KS, num_seeds=0)


def test_mutual_information_is_one_for_classes_apart_and_low_for_noise() -> None:
    vectors, ids, labels = clustered([20] * 5, noise=0.05)
    assert normalized_mutual_information(vectors, ids, labels) == pytest.approx(1)
    noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
    assert normalized_mutual_information(noise, ids, labels) < 0.3


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ResourceError, match=r"\[nmi\]"):
        normalized_mutual_information(*clustered([3, 3]))


@given(positions=st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True))
def test_interpolated_precision_is_the_best_at_or_beyond_a_recall(positions: list[int]) -> None:
    found = np.array(sorted(positions), np.int64)
    levels = np.linspace(0, 1, 21)
    for level, value in zip(levels, precision_at_recall(found, levels), strict=True):
        reached = [(n + 1) / (p + 1) for n, p in enumerate(found) if (n + 1) / len(found) >= level - 1e-9]
        assert value == pytest.approx(max(reached))
