"""Approximate search: efforts, exact scores, filters of every selectivity, and many threads at once."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy import ndarray

from indexing.index_types import IndexType, create_untrained
from indexing.searching import faiss_searcher as faiss_searcher_module
from indexing.searching import survivors
from indexing.searching.blas_threshold import set_blas_threshold
from indexing.searching.exact import ExactSearcher
from indexing.searching.faiss_searcher import FaissSearcher
from indexing.searching.recall_curve import MeasuredDepth, RecallCurve, RecallPoint
from indexing.searching.sharded import ShardedSearcher
from indexing.vector_store import VectorStore
from lookalike.exact_search import exact_search
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import load_faiss
from lookalike.records import Effort, SearchHits, SearchParameters

NUM_VECTORS, DIM, K = 20_000, 64, 10
TYPES = ("IVF128,Flat", "IVF128,SQfp16", "IVF128,SQ8", "IVF128,RaBitQ", "HNSW16", "HNSW16,SQ8")
FULL = Effort(num_probes=128, breadth=2000, candidates_per_hit=300)


@dataclass(frozen=True)
class Collection:
    store: VectorStore
    landmarks: ndarray  # of each row of the store
    queries: ndarray


@pytest.fixture(scope="module")
def collection() -> Collection:
    """Landmarks of 20 views in themes of 10 landmarks, as pictures are; ids are scattered over 63 bits."""
    generator = np.random.default_rng(0)
    themes = generator.normal(size=(NUM_VECTORS // 200, DIM))
    centres = np.repeat(themes, 10, axis=0) + generator.normal(size=(NUM_VECTORS // 20, DIM))
    landmarks = generator.permutation(np.repeat(np.arange(NUM_VECTORS // 20), 20))
    vectors = unit(centres[landmarks] + 1.1 * generator.normal(size=(NUM_VECTORS, DIM)))
    ids = np.sort(generator.choice(2**62, NUM_VECTORS, replace=False)).astype(np.int64)
    queries = unit(vectors[:150] + 0.1 * generator.normal(size=(150, DIM)))
    return Collection(VectorStore.of(vectors, ids), landmarks, queries)


@pytest.fixture(scope="module")
def searchers(collection: Collection) -> dict[str, FaissSearcher]:
    return {name: make_searcher(name, collection.store) for name in TYPES}


def make_searcher(name: str, store: VectorStore, curve: RecallCurve = RecallCurve()) -> FaissSearcher:  # noqa: B008
    index_type = IndexType.parse(name)
    if index_type.family == "flat":
        return FaissSearcher(None, index_type, store, [MeasuredDepth(10, curve, Effort())])
    index = create_untrained(index_type, store.dim, seed=0)
    index.train(store.vectors[::3].copy())
    if index_type.family == "hnsw":
        index = load_faiss().IndexIDMap(index)
    index.add_with_ids(store.vectors, store.ids)
    return FaissSearcher(index, index_type, store, [MeasuredDepth(10, curve, Effort(num_probes=1, breadth=4))])


def unit(vectors: ndarray) -> ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(collection: Collection, queries: ndarray, rows: ndarray | slice = slice(None)) -> SearchHits:
    return exact_search(queries, collection.store.vectors[rows], collection.store.ids[rows], k=K)


def share_found(hits: SearchHits, truth: SearchHits) -> float:
    found = [np.isin(wanted, row).sum() for row, wanted in zip(hits.ids, truth.ids, strict=True)]
    return float(np.sum(found) / (truth.ids >= 0).sum())


@pytest.mark.parametrize("name", TYPES)
def test_more_effort_finds_more_and_full_effort_finds_everything(
    name: str, collection: Collection, searchers: dict[str, FaissSearcher]
) -> None:
    truth = brute_force(collection, collection.queries)
    efforts = [Effort(num_probes=2, breadth=16, candidates_per_hit=2), Effort(24, 200, 8), FULL]
    recalls = []
    for effort in efforts:
        hits = searchers[name].search(collection.queries, SearchParameters(k=K, effort=effort))
        rows = collection.store.rows_of(hits.ids.ravel()).reshape(hits.ids.shape)
        products = np.einsum("qd,qkd->qk", collection.queries, collection.store.vectors[rows], dtype=np.float64)
        np.testing.assert_array_equal(hits.scores, products.astype(np.float32))  # whatever the codec
        recalls.append(share_found(hits, truth))
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    if name.startswith("IVF"):
        np.testing.assert_array_equal(hits.ids, truth.ids)
        np.testing.assert_array_equal(hits.scores, truth.scores)
    else:  # a graph promises nothing, even at full breadth
        assert recalls[-1] > 0.999


@pytest.mark.parametrize("name", ["Flat", *TYPES])
def test_exact_search_is_exact_whatever_the_index(
    name: str, collection: Collection, searchers: dict[str, FaissSearcher]
) -> None:
    truth = brute_force(collection, collection.queries)
    searcher = searchers.get(name) or make_searcher(name, collection.store)
    for parameters in (
        SearchParameters(k=K, exact=True, effort=Effort(num_probes=1)),
        SearchParameters(k=K, recall=1.0),
    ):
        hits = searcher.search(collection.queries, parameters)
        np.testing.assert_array_equal(hits.ids, truth.ids)
        np.testing.assert_array_equal(hits.scores, truth.scores)


def test_of_exact_effort_and_recall_the_first_decides(collection: Collection) -> None:
    efforts = [Effort(num_probes=n) for n in (1, 4, 16)]
    curve = RecallCurve(tuple(RecallPoint(e, r) for e, r in zip(efforts, (0.8, 0.95, 1.0), strict=True)))
    assert RecallCurve.from_list(curve.to_list()) == curve
    searcher = make_searcher("IVF128,Flat", collection.store, curve)
    own = Effort(num_probes=9)
    for parameters, expected in [
        (SearchParameters(), Effort(num_probes=1, breadth=4)),
        (SearchParameters(recall=0.5), efforts[0]),
        (SearchParameters(recall=0.95), efforts[1]),
        (SearchParameters(recall=0.951), efforts[2]),
        (SearchParameters(recall=1.0), None),  # a sample cannot promise that nothing is ever missed
        (SearchParameters(recall=0.5, effort=own), own),
        (SearchParameters(recall=0.5, effort=own, exact=True), None),
    ]:
        assert searcher.effort_of(parameters) == expected
    assert RecallCurve(curve.points[:2]).effort_for(0.96) is None


def test_long_lists_are_searched_as_hard_as_was_measured_for_long_lists(collection: Collection) -> None:
    flat = make_searcher("IVF128,Flat", collection.store)
    depths = [
        MeasuredDepth(
            depth, RecallCurve((RecallPoint(Effort(num_probes=probes), 0.95),)), Effort(num_probes=2 * probes)
        )
        for depth, probes in ((10, 3), (100, 12))
    ]
    assert [MeasuredDepth.from_tree(measured.to_tree()) for measured in depths] == depths
    searcher = FaissSearcher(flat.index, flat.index_type, collection.store, depths)
    for k, probes in ((1, 3), (10, 3), (11, 12), (100, 12), (500, 12)):
        assert searcher.effort_of(SearchParameters(k=k, recall=0.95)) == Effort(num_probes=probes)
        assert searcher.effort_of(SearchParameters(k=k)) == Effort(num_probes=2 * probes)


@pytest.mark.parametrize("kind", ["random", "goes with the clusters", "far from the query"])
@pytest.mark.parametrize("name", ["IVF128,Flat", "IVF128,RaBitQ", "HNSW16"])
def test_filters_keep_the_recall(
    name: str, kind: str, collection: Collection, searchers: dict[str, FaissSearcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 99%, 50%, 10% and 1% of survivors; at the first three also without the way out of exact search."""
    searcher, queries = searchers[name], collection.queries
    effort = Effort(num_probes=8, breadth=48, candidates_per_hit=20 if "RaBitQ" in name else 1)
    level = share_found(
        searcher.search(queries, SearchParameters(k=K, effort=effort)), brute_force(collection, queries)
    )
    assert level > 0.9
    places = {
        "random": np.random.default_rng(1).random(NUM_VECTORS),
        "goes with the clusters": collection.landmarks % 100 + collection.landmarks / 1e6,  # theme after theme
        "far from the query": collection.store.vectors @ queries[:40].mean(axis=0),
    }[kind]
    asked = queries[:40] if kind == "far from the query" else queries
    for share in (0.99, 0.5, 0.1, 0.01):
        rows = np.sort(np.argsort(places, kind="stable")[: int(share * NUM_VECTORS)])
        truth = brute_force(collection, asked, rows)
        parameters = SearchParameters(k=K, effort=effort, among=IdSelection.only(collection.store.ids[rows]))
        planned = searcher.search(asked, parameters)
        assert np.isin(planned.ids, collection.store.ids[rows]).all()
        assert share_found(planned, truth) >= 0.97 * level, (share, "as planned")
        if share < 0.1:
            continue  # so few are never searched in another way
        with monkeypatch.context() as patch:
            patch.setattr(faiss_searcher_module, "exact_is_cheaper", lambda *_, **__: False)
            widened = searcher.search(asked, parameters)
        assert np.isin(widened.ids, collection.store.ids[rows]).all()
        assert share_found(widened, truth) >= 0.97 * level, (share, "without exact search")


def test_few_survivors_are_searched_exactly(collection: Collection, searchers: dict[str, FaissSearcher]) -> None:
    for name, searcher in searchers.items():
        for count in (0, 1, 7, 150):
            rows = np.arange(0, 3 * count, 3)
            selection = IdSelection.only(collection.store.ids[rows])
            hits = searcher.search(collection.queries, SearchParameters(k=K, among=selection))
            truth = brute_force(collection, collection.queries, rows)
            np.testing.assert_array_equal(hits.ids, truth.ids, err_msg=f"{name}, {count} survivors")


def test_deleted_vectors_are_passed_over(collection: Collection, searchers: dict[str, FaissSearcher]) -> None:
    best = brute_force(collection, collection.queries).ids[:, 0]
    parameters = SearchParameters(k=K, effort=FULL, among=IdSelection.all_but(best))
    kept = ~np.isin(collection.store.ids, best)
    truth = brute_force(collection, collection.queries, np.flatnonzero(kept))
    for name in ("IVF128,SQ8", "IVF128,Flat"):
        np.testing.assert_array_equal(searchers[name].search(collection.queries, parameters).ids, truth.ids)


@pytest.mark.parametrize("name", ["IVF128,Flat", "HNSW16"])
def test_batches_among_many_partitions_are_searched_in_parts(
    name: str, collection: Collection, searchers: dict[str, FaissSearcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries times partitions would fill the memory; how a batch is cut changes no answer."""
    monkeypatch.setattr(faiss_searcher_module, "exact_is_cheaper", lambda *_, **__: False)
    selection = IdSelection.only(collection.store.ids[::2])
    parameters = SearchParameters(k=K, effort=Effort(num_probes=8, breadth=64), among=selection)
    whole = searchers[name].search(collection.queries, parameters)
    monkeypatch.setattr(faiss_searcher_module, "_MOST_PLACES", 7 * 128)
    parts = searchers[name].search(collection.queries, parameters)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_array_equal(parts.scores, whole.scores)


def test_an_answer_that_misses_a_survivor_is_told_from_one_that_does_not(collection: Collection) -> None:
    kept = survivors.Survivors.of(IdSelection.only(collection.store.ids[::2]), collection.store)
    truth = brute_force(collection, collection.queries, slice(None, None, 2))
    assert not kept.are_missed(collection.queries, truth).any()
    ids, scores = truth.ids.copy(), truth.scores.copy()
    ids[3, -1], scores[3, -1] = -1, -np.inf
    worst = brute_force(collection, -collection.queries[5:6], slice(None, None, 2))
    ids[5], scores[5] = worst.ids[0], -worst.scores[0]
    missed = kept.are_missed(collection.queries, SearchHits(ids, scores))
    assert np.flatnonzero(missed).tolist() == [3, 5]


def test_a_selector_for_dense_ids_holds_the_same_vectors() -> None:
    generator = np.random.default_rng(0)
    vectors, is_kept = unit(generator.normal(size=(500, 8))), generator.random(500) < 0.4
    for ids in (np.arange(500), 3 + 5 * np.arange(500), np.arange(500) + 2**60):
        store = VectorStore.of(vectors, ids)
        for selection in (IdSelection.only(ids[is_kept]), IdSelection.all_but(ids[is_kept])):
            kept = survivors.Survivors.of(selection, store)
            holds = [kept.selector.is_member(int(identifier)) for identifier in ids]
            assert holds == selection.contains(ids).tolist()
            assert kept.count == sum(holds)


def test_many_threads_with_mixed_parameters_get_the_answers_of_one(
    collection: Collection, searchers: dict[str, FaissSearcher]
) -> None:
    """Parameters travel with the query: no search may change what another one sees."""
    generator = np.random.default_rng(2)
    halves = [IdSelection.only(collection.store.ids[generator.random(NUM_VECTORS) < share]) for share in (0.5, 0.1)]
    everything = {
        **{name: searchers[name] for name in ("IVF128,SQ8", "IVF128,RaBitQ", "HNSW16")},
        "exact": ExactSearcher(collection.store),
        "exact bfloat16": ExactSearcher(collection.store, precision="bfloat16"),
        "sharded": ShardedSearcher(
            [
                make_searcher(
                    "IVF128,Flat", VectorStore.of(collection.store.vectors[part::2], collection.store.ids[part::2])
                )
                for part in range(2)
            ]
        ),
    }
    tasks = []
    for _ in range(300):
        name = str(generator.choice(list(everything)))
        parameters = SearchParameters(
            k=int(generator.choice([1, 5, 30])), exact=bool(generator.random() < 0.15), effort=Effort(8, 40, 2)
        )
        if generator.random() < 0.6:
            effort = Effort(
                int(generator.integers(1, 128)), int(generator.integers(1, 200)), int(generator.integers(1, 9))
            )
            parameters = replace(parameters, effort=effort)
        if generator.random() < 0.3:
            parameters = replace(parameters, among=halves[int(generator.integers(2))])
        rows = generator.choice(150, int(generator.choice([1, 2, 8, 33])), replace=False)
        tasks.append((name, collection.queries[rows], parameters))
    expected = [everything[name].search(queries, parameters) for name, queries, parameters in tasks]
    order = np.concatenate([generator.permutation(len(tasks)) for _ in range(2)])
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda task: everything[tasks[task][0]].search(*tasks[task][1:]), order))
    for task, answer in zip(order, answers, strict=True):
        np.testing.assert_array_equal(answer.ids, expected[task].ids, err_msg=str(tasks[task][0::2]))
        np.testing.assert_array_equal(answer.scores, expected[task].scores)


def test_the_threshold_for_products_of_matrices_is_measured_once() -> None:
    faiss = load_faiss()
    threshold = set_blas_threshold()
    assert 0 <= threshold <= 128_000
    assert faiss.cvar.distance_compute_blas_threshold == threshold == set_blas_threshold()


def test_shards_must_be_disjoint_and_of_one_dimension() -> None:
    part = ExactSearcher(VectorStore.of(np.eye(3, dtype=np.float32), np.arange(3)))
    with pytest.raises(ValueError, match="id 0 is in two parts"):
        ShardedSearcher([part, part])
    with pytest.raises(ValueError, match="one dimension"):
        ShardedSearcher([part, ExactSearcher(VectorStore.of(np.eye(4, dtype=np.float32), np.arange(9, 13)))])
    with pytest.raises(ValueError, match="one dimension"):
        ShardedSearcher([])
