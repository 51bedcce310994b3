"""Every method against its slow twin, in float64 and obvious loops, and what all methods promise."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from indexing.reranking.average_query_expansion import expand_by_average
from indexing.reranking.database_augmentation import augmented_vectors
from indexing.reranking.registry import first_search, rerank, search_and_rerank
from indexing.reranking.settings import (
    METHOD_NAMES,
    AlphaQueryExpansion,
    AverageQueryExpansion,
    DatabaseAugmentation,
    Diffusion,
    KReciprocal,
    RerankSettings,
    parse_rerank,
)
from lookalike.errors import SettingsError
from lookalike.exact_search import exact_search
from lookalike.id_selection import IdSelection
from lookalike.records import SearchHits, SearchParameters

# Scores are rounded to float32; sums in another order move their last bits.
TOLERANCE = 2e-6


class BruteForce:
    """A searcher that compares one pair after the other."""

    def __init__(self, vectors: ndarray, ids: ndarray) -> None:
        self.vector_of = dict(zip(ids.tolist(), vectors, strict=True))
        self.num_vectors, self.dim = vectors.shape
        self.searches: list[SearchParameters] = []

    def search(self, queries: ndarray, parameters: SearchParameters) -> SearchHits:
        self.searches.append(parameters)
        assert parameters.filter is None
        ids = np.full((len(queries), parameters.k), -1, np.int64)
        scores = np.full((len(queries), parameters.k), -np.inf, np.float32)
        for row, query in enumerate(queries):
            ranked = sorted(
                (-float(np.float32(cosine(query, vector))), id)
                for id, vector in self.vector_of.items()
                if parameters.among is None or parameters.among.contains(np.array([id]))[0]
            )
            for place, (distance, id) in enumerate(ranked[: parameters.k]):
                ids[row, place], scores[row, place] = id, -distance
        return SearchHits(ids, scores)

    def vectors_of(self, ids: ndarray) -> ndarray:
        return np.array([self.vector_of[id] for id in ids.tolist()], np.float32).reshape(-1, self.dim)

    def ids(self) -> ndarray:
        return np.array(sorted(self.vector_of), np.int64)


def cosine(one: ndarray, other: ndarray) -> float:
    return math.fsum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def rounded_cosine(one: ndarray, other: ndarray) -> float:
    return float(np.float32(cosine(one, other)))


def unit(vectors: ndarray) -> ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def make_gallery(num_vectors: int, *, seed: int, dim: int = 6, num_queries: int = 3) -> tuple[ndarray, BruteForce]:
    """Clusters, some exact duplicates, ids in no order; queries near some of the vectors."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(1, num_vectors // 5), dim))
    vectors = centres[generator.integers(len(centres), size=num_vectors)] + 0.5 * generator.normal(
        size=(num_vectors, dim)
    )
    if num_vectors > 4:
        vectors[1], vectors[2] = vectors[0], vectors[0]
    ids = generator.choice(10_000, num_vectors, replace=False).astype(np.int64)
    queries = centres[generator.integers(len(centres), size=num_queries)] + 0.5 * generator.normal(
        size=(num_queries, dim)
    )
    return unit(queries), BruteForce(unit(vectors), ids)


# ---- The slow twins: new scores of the ids that a method places


def slow_expansion(
    searcher: BruteForce, query: ndarray, hits: list[int], n: int, weight: Callable[[float], float]
) -> dict[int, float]:
    total = [float(value) for value in query]
    for id in hits[:n]:
        neighbour = searcher.vector_of[id]
        for axis in range(searcher.dim):
            total[axis] += weight(cosine(query, neighbour)) * float(neighbour[axis])
    length = math.sqrt(sum(value * value for value in total))
    return {id: cosine(np.array(total) / length, vector) for id, vector in searcher.vector_of.items()}


def slow_augmentation(searcher: BruteForce, query: ndarray, hits: list[int], n: int) -> dict[int, float]:
    scores = {}
    for id in hits:
        own = searcher.vector_of[id]
        others = sorted(
            (-rounded_cosine(own, vector), other) for other, vector in searcher.vector_of.items() if other != id
        )
        total = own.astype(np.float64)
        for rank, (_, other) in enumerate(others[:n], start=1):
            total = total + (n + 1 - rank) / (n + 1) * searcher.vector_of[other]
        scores[id] = cosine(query, total / np.linalg.norm(total))
    return scores


def slow_reciprocal(
    searcher: BruteForce, query: ndarray, hits: list[int], k1: int, k2: int, share: float
) -> dict[int, float]:
    members = [query, *(searcher.vector_of[id] for id in hits)]
    everyone = range(len(members))
    near = [sorted(everyone, key=lambda j, i=i: (i != j, -rounded_cosine(members[i], members[j]), j)) for i in everyone]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in near[i][: k + 1] if i in near[j][: k + 1]}

    weights = []
    for i in everyone:
        neighbourhood = mutual(i, k1)
        for j in mutual(i, k1):
            candidates = mutual(j, max(1, round(k1 / 2)))
            if len(candidates & mutual(i, k1)) > 2 / 3 * len(candidates):
                neighbourhood |= candidates
        row = {j: math.exp(rounded_cosine(members[i], members[j]) - 1) for j in neighbourhood}
        weights.append({j: value / sum(row.values()) for j, value in row.items()})
    averaged = [
        {j: sum(weights[other].get(j, 0) for other in near[i][:k2]) / len(near[i][:k2]) for j in everyone}
        for i in everyone
    ]
    scores = {}
    for place, id in enumerate(hits, start=1):
        least = sum(min(averaged[0][j], averaged[place][j]) for j in everyone)
        most = sum(max(averaged[0][j], averaged[place][j]) for j in everyone)
        scores[id] = (1 - share) * least / most + share * cosine(query, members[place])
    return scores


def slow_diffusion(
    searcher: BruteForce, query: ndarray, hits: list[int], k: int, num_seeds: int, alpha: float, gamma: float
) -> dict[int, float]:
    """A dense solution; a hit that is not reached keeps its place behind the others."""
    vectors = [searcher.vector_of[id] for id in hits]
    everyone = range(len(vectors))
    near = [
        sorted(set(everyone) - {i}, key=lambda j, i=i: (-rounded_cosine(vectors[i], vectors[j]), j))[:k]
        for i in everyone
    ]
    affinity = np.zeros((len(vectors), len(vectors)))
    for i in everyone:
        for j in everyone:
            if j in near[i] and i in near[j]:
                affinity[i, j] = max(0.0, rounded_cosine(vectors[i], vectors[j])) ** gamma
    system = np.eye(len(vectors))
    for i in everyone:
        for j in everyone:
            if affinity[i, j]:
                system[i, j] -= alpha * affinity[i, j] / math.sqrt(affinity[i].sum() * affinity[j].sum())
    seeds = [max(0.0, rounded_cosine(query, vectors[i])) ** gamma if i < num_seeds else 0.0 for i in everyone]
    walked = (1 - alpha) * np.linalg.solve(system, np.array(seeds))
    reached = {i for i in everyone if seeds[i] > 0}
    while more := {j for i in reached for j in everyone if affinity[i, j] > 0} - reached:
        reached |= more
    return {
        id: float(walked[i]) if i in reached else rounded_cosine(query, vectors[i]) - 2 for i, id in enumerate(hits)
    }


def slow_scores(
    method: RerankSettings, searcher: BruteForce, query: ndarray, parameters: SearchParameters
) -> dict[int, float]:
    found = searcher.search(query[None], replace(parameters, k=searcher.num_vectors + 1))
    hits = [int(id) for id in found.ids[0] if id >= 0]
    match method:
        case AverageQueryExpansion():
            return slow_expansion(searcher, query, hits, method.num_neighbours, lambda similarity: 1.0)
        case AlphaQueryExpansion():
            return slow_expansion(
                searcher, query, hits, method.num_neighbours, lambda similarity: max(0.0, similarity) ** method.alpha
            )
        case DatabaseAugmentation():
            placed = slow_augmentation(searcher, query, hits[: method.shortlist], method.num_neighbours)
        case KReciprocal():
            numbers = method.num_neighbours, method.num_averaged, method.cosine_share
            placed = slow_reciprocal(searcher, query, hits[: method.shortlist], *numbers)
        case Diffusion():
            sizes = method.num_neighbours, method.num_seeds
            placed = slow_diffusion(searcher, query, hits[: method.shortlist], *sizes, method.alpha, method.gamma)
    return {id: cosine(query, searcher.vector_of[id]) - 2 for id in hits} | placed


def assert_is_ranking(ids: ndarray, scores: ndarray, expected: dict[int, float], *, k: int) -> None:
    """Ids are the best of `expected`, with its scores, sorted by score and then by id, padded with -1."""
    num_found = min(k, len(expected))
    assert ids.shape == scores.shape == (k,)
    assert (ids[num_found:] == -1).all()
    assert np.isneginf(scores[num_found:]).all()
    ids, scores = ids[:num_found], scores[:num_found]
    assert len(set(ids.tolist())) == num_found
    np.testing.assert_allclose(scores, [expected[id] for id in ids.tolist()], atol=TOLERANCE)
    assert sorted(zip(-scores, ids, strict=True)) == list(zip(-scores, ids, strict=True))
    left_out = [score for id, score in expected.items() if id not in set(ids.tolist())]
    assert not left_out or max(left_out) <= scores[-1] + TOLERANCE


METHODS: tuple[RerankSettings, ...] = (
    AverageQueryExpansion(num_neighbours=2),
    AlphaQueryExpansion(num_neighbours=6, alpha=2.5),
    DatabaseAugmentation(shortlist=12, num_neighbours=3),
    KReciprocal(shortlist=14, num_neighbours=5, num_averaged=3, cosine_share=0.25),
    Diffusion(shortlist=15, num_neighbours=4, num_seeds=3, alpha=0.9, gamma=2.0),
)
by_every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def test_every_method_is_here() -> None:
    assert tuple(method.name for method in METHODS) == METHOD_NAMES


@by_every_method
@settings(max_examples=25, deadline=None)
@given(num_vectors=st.integers(0, 40), k=st.integers(1, 50), seed=st.integers(0, 10_000))
def test_a_method_ranks_as_its_slow_twin(method: RerankSettings, num_vectors: int, k: int, seed: int) -> None:
    queries, searcher = make_gallery(num_vectors, seed=seed, num_queries=1)
    hits = search_and_rerank(searcher, queries, SearchParameters(k=k), method)
    expected = slow_scores(method, searcher, queries[0], SearchParameters())
    assert_is_ranking(hits.ids[0], hits.scores[0], expected, k=k)


@by_every_method
def test_an_answer_does_not_depend_on_the_other_queries(method: RerankSettings) -> None:
    queries, searcher = make_gallery(60, seed=1, num_queries=7)
    together = search_and_rerank(searcher, queries, SearchParameters(k=20), method)
    for row, query in enumerate(queries):
        alone = search_and_rerank(searcher, query[None], SearchParameters(k=20), method)
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])
        np.testing.assert_array_equal(alone.scores[0], together.scores[row])
    assert search_and_rerank(searcher, queries[:0], SearchParameters(k=20), method).ids.shape == (0, 20)


@by_every_method
def test_what_must_not_be_found_has_no_say(method: RerankSettings) -> None:
    queries, searcher = make_gallery(60, seed=2)
    hidden = searcher.search(queries[:1], SearchParameters(k=9)).ids[0][::2]
    parameters = SearchParameters(k=25, among=IdSelection.all_but(hidden), exact=True)
    hits = search_and_rerank(searcher, queries, parameters, method)
    for asked in searcher.searches[1:]:
        assert (asked.among, asked.exact) == (parameters.among, True)
    rest = np.setdiff1d(searcher.ids(), hidden)
    without = BruteForce(searcher.vectors_of(rest), rest)
    expected = search_and_rerank(without, queries, SearchParameters(k=25), method)
    np.testing.assert_array_equal(hits.ids, expected.ids)
    np.testing.assert_array_equal(hits.scores, expected.scores)


@by_every_method
def test_where_all_pictures_are_equal_ids_decide(method: RerankSettings) -> None:
    queries, _ = make_gallery(5, seed=3, num_queries=2)
    ids = np.random.default_rng(0).permutation(30).astype(np.int64)
    searcher = BruteForce(np.repeat(queries[:1], 30, axis=0), ids)
    hits = search_and_rerank(searcher, queries, SearchParameters(k=30), method)
    np.testing.assert_array_equal(hits.ids, np.tile(np.arange(30), (2, 1)))


@by_every_method
def test_pictures_that_all_point_away_are_ranked_all_the_same(method: RerankSettings) -> None:
    searcher = BruteForce(unit(np.array([[-1.0, 0.1], [-1.0, -0.1], [-1.0, 0.3]])), np.array([4, 2, 9]))
    hits = search_and_rerank(searcher, np.array([[1.0, 0.0]], np.float32), SearchParameters(k=4), method)
    assert sorted(hits.ids[0].tolist()) == [-1, 2, 4, 9]
    assert not np.isnan(hits.scores).any()


@pytest.mark.parametrize("method", METHODS[2:], ids=lambda method: method.name)
def test_only_the_shortlist_changes_its_order(method: RerankSettings) -> None:
    assert isinstance(method, DatabaseAugmentation | KReciprocal | Diffusion)
    queries, searcher = make_gallery(80, seed=4, num_queries=10)
    before = searcher.search(queries, SearchParameters(k=40))
    after = rerank(method, searcher, queries, before, SearchParameters(k=40))
    np.testing.assert_array_equal(after.ids[:, method.shortlist :], before.ids[:, method.shortlist :])
    head = slice(method.shortlist)
    np.testing.assert_array_equal(np.sort(after.ids[:, head]), np.sort(before.ids[:, head]))
    assert (after.ids[:, head] != before.ids[:, head]).any()


def test_settings_at_their_ends_give_what_is_known_otherwise() -> None:
    queries, searcher = make_gallery(50, seed=5)
    parameters = SearchParameters(k=30)
    plain = searcher.search(queries, parameters)

    by_cosine = search_and_rerank(searcher, queries, parameters, KReciprocal(shortlist=30, cosine_share=1))
    np.testing.assert_array_equal(by_cosine.ids, plain.ids)
    np.testing.assert_allclose(by_cosine.scores, plain.scores, atol=TOLERANCE)

    # A walk that never leaves its seeds.
    staying = search_and_rerank(searcher, queries, parameters, Diffusion(shortlist=30, num_seeds=30, alpha=0))
    np.testing.assert_array_equal(staying.ids, plain.ids)

    average = search_and_rerank(searcher, queries, parameters, AverageQueryExpansion(num_neighbours=5))
    unweighted = search_and_rerank(searcher, queries, parameters, AlphaQueryExpansion(num_neighbours=5, alpha=0))
    all_near = plain.scores[:, 4] > 0
    assert all_near.any()
    np.testing.assert_array_equal(unweighted.ids[all_near], average.ids[all_near])

    np.testing.assert_array_equal(expand_by_average(queries[0], np.zeros((0, 6), np.float32)), queries[0])
    np.testing.assert_array_equal(expand_by_average(queries[0], -queries[:1]), queries[0])


def test_an_augmented_gallery_ranks_as_augmentation_on_the_way_does() -> None:
    queries, searcher = make_gallery(300, seed=6)
    ids = searcher.ids()
    parameters = SearchParameters(k=40)
    augmented = augmented_vectors(searcher, ids, num_neighbours=4, parameters=parameters)
    np.testing.assert_allclose(np.linalg.norm(augmented, axis=1), 1, atol=1e-6)
    expected = exact_search(queries, augmented, ids, k=40)
    hits = search_and_rerank(searcher, queries, parameters, DatabaseAugmentation(shortlist=300, num_neighbours=4))
    np.testing.assert_array_equal(hits.ids, expected.ids)
    np.testing.assert_array_equal(hits.scores, expected.scores)
    with pytest.raises(KeyError):
        augmented_vectors(searcher, np.array([ids.max() + 1]), num_neighbours=4, parameters=parameters)


def test_diffusion_walks_along_an_arc_that_cosines_cut_short() -> None:
    """The far end of the query's own arc comes before a nearer cluster beside it."""
    angles = np.linspace(0, 1.4, 30)
    arc = np.stack([np.cos(angles), np.sin(angles), np.zeros(30)], axis=1)
    beside = np.array([0.7, 0, 0.71]) + 0.02 * np.random.default_rng(0).normal(size=(30, 3))
    searcher = BruteForce(unit(np.concatenate([arc, beside])), np.arange(60))
    query = np.array([[1, 0, 0]], np.float32)
    parameters = SearchParameters(k=30)
    assert searcher.search(query, parameters).ids.max() >= 30
    walk = Diffusion(shortlist=60, num_neighbours=4, num_seeds=3)
    assert sorted(search_and_rerank(searcher, query, parameters, walk).ids[0].tolist()) == list(range(30))


def test_a_first_search_is_as_deep_as_the_method_needs() -> None:
    parameters = SearchParameters(k=10, exact=True)
    assert first_search(AverageQueryExpansion(num_neighbours=3), parameters) == replace(parameters, k=3)
    assert first_search(KReciprocal(shortlist=70), parameters) == replace(parameters, k=70)
    assert first_search(Diffusion(shortlist=7), parameters) == parameters


class TestSettings:
    def test_a_name_stands_for_the_defaults(self) -> None:
        for name in METHOD_NAMES:
            method = parse_rerank(name)
            assert method == parse_rerank({"name": name})
            assert method.name == name
        assert parse_rerank({"name": "diffusion", "alpha": 0.5}) == Diffusion(alpha=0.5)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("magic", "name: must be one of average_query_expansion, .*, diffusion"),
            ({}, "name: must be one of"),
            ({"name": ["diffusion"]}, "name: must be one of"),
            ({"name": "diffusion", "alpha": 1}, "alpha: Input should be less than 1"),
            (
                {"name": "k_reciprocal", "num_neighbors": 3},
                "num_neighbors: there is no such setting; k_reciprocal has shortlist, num_neighbours, .*",
            ),
            ({"name": "diffusion", "gamma": float("inf")}, "gamma: .*finite"),
            ({"name": "diffusion", "gamma": float("nan")}, "gamma: .*finite"),
            ({"name": "alpha_query_expansion", "alpha": float("inf")}, "alpha: .*finite"),
            ({"name": "database_augmentation", "shortlist": 2001}, "shortlist: .*2000"),
            ({"name": "average_query_expansion", "num_neighbours": 0}, "num_neighbours: .*1"),
        ],
    )
    def test_what_is_no_method_is_refused(self, method: str | dict[str, object], message: str) -> None:
        with pytest.raises(SettingsError, match=f"rerank: .*{message}"):
            parse_rerank(method)

    def test_settings_load_neither_torch_nor_faiss_nor_scipy(self) -> None:
        program = "import sys, indexing.reranking.settings; print({'torch', 'faiss', 'scipy'} & sys.modules.keys())"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "set()"
