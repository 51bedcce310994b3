"""Planning: predictions, choices, trials, and the measured curve that a promise of recall rests on."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from jaxtyping import Float32
from numpy import ndarray

from indexing.building.training import train_centroids
from indexing.index_types import IndexType, create_untrained
from indexing.planning import calibration, trials
from indexing.planning.calibration import nominal_rates
from indexing.planning.candidates import candidate_types, partition_counts
from indexing.planning.choice import Candidate, choose
from indexing.planning.cost_model import SearchWork, build_seconds, memory_bytes, query_seconds
from indexing.planning.held_out import held_out_of_graph, held_out_rows
from indexing.planning.measuring import MeasuredQueries, least_reaching, measure_index, others_than, recalls_by_depth
from indexing.planning.plan import Plan
from indexing.planning.planner import plan_index
from indexing.planning.report import plan_lines
from indexing.planning.trials import Partitioning, Trial, draw_trial_set
from indexing.searching.faiss_searcher import FaissSearcher
from indexing.searching.recall_curve import MeasuredDepth, RecallCurve
from indexing.settings import IndexSettings
from indexing.vector_store import VectorStore
from lookalike.errors import SettingsError
from lookalike.exact_search import exact_search
from lookalike.native_libraries import load_faiss
from lookalike.products import product
from lookalike.records import Effort, SearchParameters
from lookalike.settings import validate_settings

NUM_VECTORS, NUM_FRESH, DIM = 6000, 1500, 48


def clustered() -> Float32[ndarray, "n dim"]:
    """Many objects with some twenty more or less similar views each."""
    generator = np.random.default_rng(0)
    objects = generator.normal(size=((NUM_VECTORS + NUM_FRESH) // 20, DIM))
    rows = generator.integers(0, len(objects), NUM_VECTORS + NUM_FRESH)
    spread = generator.uniform(0.3, 1.2, (len(rows), 1))
    return unit(objects[rows] + spread * generator.normal(size=(len(rows), DIM)))


def isotropic() -> Float32[ndarray, "n dim"]:
    return unit(np.random.default_rng(1).normal(size=(NUM_VECTORS + NUM_FRESH, DIM)))


def patches() -> Float32[ndarray, "n dim"]:
    """7 x 7 patches of a smooth picture, less their mean: few strong directions and a long tail, as in real data."""
    generator = np.random.default_rng(2)
    picture = np.cumsum(np.cumsum(generator.normal(size=(512, 512)), axis=0), axis=1)
    tops, lefts = generator.integers(0, 505, (2, NUM_VECTORS + NUM_FRESH))
    cut = np.stack([picture[top : top + 7, left : left + 7].ravel() for top, left in zip(tops, lefts, strict=True)])
    return unit((cut - cut.mean(axis=1, keepdims=True))[:, :DIM] + 1e-3 * generator.normal(size=(len(cut), DIM)))


def unit(rows: ndarray) -> Float32[ndarray, "n dim"]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def searcher_over(store: VectorStore, name: str) -> FaissSearcher:
    """An index in memory, as building makes it on disk; a graph is measured before it gets what is held out."""
    index_type = IndexType.parse(name)
    index = create_untrained(index_type, store.dim, seed=0)
    draw = held_out_of_graph if index_type.family == "hnsw" else held_out_rows
    trained = np.setdiff1d(np.arange(store.num_vectors), draw(store.num_vectors, seed=0))
    sample, ids = np.asarray(store.vectors[trained]), np.asarray(store.ids)
    if index_type.family == "ivf":
        index.quantizer.add(train_centroids(sample, index_type.num_partitions, seed=0))
    index.train(sample)
    if index_type.family == "hnsw":
        index = load_faiss().IndexIDMap(index)
        index.add_with_ids(sample, ids[trained])
    else:
        index.add_with_ids(np.asarray(store.vectors), ids)
    return FaissSearcher(index, index_type, store, [MeasuredDepth(10, RecallCurve(), Effort())])


def add_what_is_held_out(searcher: FaissSearcher, store: VectorStore) -> None:
    if searcher.index.ntotal < store.num_vectors:
        rows = np.sort(held_out_of_graph(store.num_vectors, seed=0))
        searcher.index.add_with_ids(np.asarray(store.vectors[rows]), np.asarray(store.ids[rows]))


def store_of(vectors: Float32[ndarray, "n dim"]) -> VectorStore:
    return VectorStore.of(vectors, np.arange(len(vectors)) * 7 + 2**40)


@pytest.mark.parametrize("draw", [clustered, isotropic, patches], ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("name", ["IVF64,SQ8", "IVF64,RaBitQ", "HNSW16"])
def test_fresh_queries_find_what_the_curve_promises(draw, name):
    vectors = draw()
    store, fresh = store_of(vectors[:NUM_VECTORS]), vectors[NUM_VECTORS:]
    searcher = searcher_over(store, name)
    curve, default, measurements = measure_index(searcher, store, IndexSettings(type=name, recall=0.95))
    add_what_is_held_out(searcher, store)
    efforts, recalls = [p.effort for p in curve.points], [p.recall for p in curve.points]
    assert recalls == sorted(set(recalls))
    assert len(measurements["milliseconds"]) == len(curve.points)
    assert all(left != right for left, right in itertools.pairwise(efforts))
    truth = exact_search(fresh, vectors[:NUM_VECTORS], np.asarray(store.ids), k=10)
    for point in curve.points:
        found = searcher.search(fresh, SearchParameters(effort=point.effort))
        recalls = (found.scores >= truth.scores[:, -1:]).mean(axis=1)
        # Half a point, and what chance does to the mean over this many queries: 3 standard errors of the difference.
        chance = 3 * recalls.std() * (1 / NUM_FRESH + 1 / measurements["num_measured_queries"]) ** 0.5
        assert abs(recalls.mean() - point.recall) < 0.005 + chance, point
    assert default == (curve.effort_for(0.95) or curve.points[-1].effort)
    if name != "IVF64,RaBitQ" or draw is clustered:
        assert curve.effort_for(0.95) is not None
        assert next(p.recall for p in curve.points if p.effort == default) >= 0.945


def test_the_default_effort_is_the_least_of_its_kind():
    store = store_of(clustered()[:NUM_VECTORS])
    searcher = searcher_over(store, "IVF64,SQfp16")
    settings = IndexSettings(type="IVF64,SQfp16", recall=0.97)
    _, default, _ = measure_index(searcher, store, settings)
    queries = MeasuredQueries.draw(searcher, store, count=4000, at=10, seed=0)
    assert default.num_probes is not None
    assert default.num_probes > 1
    fewer = dataclasses.replace(default, num_probes=default.num_probes - 1)
    assert queries.recalls(searcher, default).mean() > 0.965
    assert queries.recalls(searcher, fewer).mean() < 0.97


def test_a_curve_depends_on_the_seed_and_not_on_the_clock():
    store = store_of(clustered()[:2000])
    searcher = searcher_over(store, "IVF32,SQ8")
    settings = IndexSettings(type="IVF32,SQ8", num_measured_queries=300)
    first, second = (measure_index(searcher, store, settings) for _ in range(2))
    assert first[0].to_list() == second[0].to_list()
    assert first[1] == second[1]


def test_copies_of_a_picture_count_as_found_whichever_is():
    vectors = np.repeat(clustered()[:100], 30, axis=0)
    store = store_of(vectors)
    searcher = searcher_over(store, "IVF16,Flat")
    queries = MeasuredQueries.draw(searcher, store, count=200, at=10, seed=0)
    assert queries.recalls(searcher, Effort(num_probes=1)).mean() == 1


def test_a_query_does_not_find_itself():
    found = np.array([[5, 7, 9], [1, 2, 3], [4, 4, -1]])
    others = others_than(np.array([7, 8, -1]), found)
    assert found[others].reshape(3, 2).tolist() == [[5, 9], [1, 2], [4, 4]]


def test_recall_by_depth_equals_counting():
    generator = np.random.default_rng(0)
    found = np.stack([generator.permutation(50)[:30] for _ in range(20)])
    wanted = np.stack([generator.permutation(50)[:10] for _ in range(20)])
    slow = [
        np.mean([np.isin(w, f[:depth]).mean() for f, w in zip(found, wanted, strict=True)]) for depth in range(1, 31)
    ]
    np.testing.assert_allclose(recalls_by_depth(found, wanted), slow, atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.501, 0.9999])
def test_the_least_value_that_reaches_a_level_is_found(level):
    assert least_reaching(level, lambda x: x / 1000, least=10, most=5000, resolution=10_000) == max(
        10, int(np.ceil(1000 * level))
    )
    assert least_reaching(2.0, lambda x: x / 1000, least=10, most=1500) == 1500


def test_coverage_of_partitions_equals_searching_them():
    """IVF with uncompressed lists finds a neighbour if and only if it visits its partition."""
    trial_set = draw_trial_set(store_of(clustered()[:NUM_VECTORS]), IndexSettings(num_measured_queries=200))
    partitioning = Partitioning(trial_set, 32)
    index = partitioning.index_of(IndexType.parse("IVF32,Flat"))
    for num_probes in (1, 3, 32):
        parameters = load_faiss().SearchParametersIVF(nprobe=num_probes)
        _, found = index.search(trial_set.queries, trial_set.at, params=parameters)
        reached = np.mean([np.isin(w, f).mean() for f, w in zip(found, trial_set.wanted, strict=True)])
        assert reached == pytest.approx(partitioning.coverage[num_probes - 1], abs=1e-6)
    assert partitioning.scanned[-1] == pytest.approx(NUM_VECTORS)


def test_queries_are_held_out_of_the_trial_and_truth_is_of_the_whole_collection(monkeypatch):
    monkeypatch.setattr("indexing.planning.trials._LARGEST_TRIAL_BYTES", 4 * DIM * 3000)
    store = store_of(clustered()[:NUM_VECTORS])
    trial_set = draw_trial_set(store, IndexSettings(num_measured_queries=60))
    assert len(trial_set.vectors) <= 3000
    rows = {row.tobytes(): number for number, row in enumerate(np.asarray(store.vectors))}
    held_out = np.array([rows[query.tobytes()] for query in trial_set.queries])
    assert not {query.tobytes() for query in trial_set.queries} & {row.tobytes() for row in trial_set.vectors}
    others = np.setdiff1d(np.arange(NUM_VECTORS), held_out)
    truth = exact_search(trial_set.queries, np.asarray(store.vectors)[others], others, k=trial_set.truth.shape[1]).ids
    found = np.array([rows[row.tobytes()] for row in trial_set.vectors])[trial_set.truth]
    assert (found == truth).all()


def test_a_collection_without_structure_is_searched_exactly(monkeypatch):
    monkeypatch.setattr("indexing.planning.candidates.LARGEST_WITHOUT_TRIAL_BYTES", 0)
    monkeypatch.setattr("indexing.planning.choice.UNNOTICED_SECONDS", 0.0)
    # In 256 directions alike, no neighbour is near.
    vectors = unit(np.random.default_rng(0).normal(size=(4000, 256)))
    plan = plan_index(store_of(vectors), IndexSettings(num_measured_queries=100))
    assert plan.index_type.name == "Flat"
    assert plan.is_reachable
    assert max(row.recall for row in plan.table if row.type.startswith("IVF")) >= 0.99
    assert "times as fast" in plan.explanation[0]


def test_a_plan_is_the_same_again_and_survives_json(monkeypatch):
    monkeypatch.setattr("indexing.planning.candidates.LARGEST_WITHOUT_TRIAL_BYTES", 0)
    monkeypatch.setattr("indexing.planning.choice.UNNOTICED_SECONDS", 0.0)
    store, settings = store_of(clustered()[:3000]), IndexSettings(num_measured_queries=50, recall=0.95)
    plan = plan_index(store, settings)
    again = plan_index(store, settings)
    assert (again.index_type, again.effort) == (plan.index_type, plan.effort)
    assert [(row.type, row.recall, row.effort) for row in again.table] == [
        (row.type, row.recall, row.effort) for row in plan.table
    ]
    assert Plan.from_tree(json.loads(json.dumps(plan.to_tree()))) == plan
    lines = plan_lines(plan)
    assert next(line for line in lines if line.startswith("> ")).split()[1] == plan.index_type.name
    assert any("Runners-up" in line for line in lines)
    assert any("One more GiB" in line for line in lines)


@pytest.mark.parametrize("settings", [IndexSettings(), IndexSettings(mode="evaluation"), IndexSettings(recall=1.0)])
def test_small_sets_evaluations_and_perfect_recall_are_flat(settings):
    count = 500 if settings == IndexSettings() else 10_000_000
    assert [kind.name for kind in candidate_types(count, 128, settings)] == ["Flat"]


def test_candidates_hold_every_family():
    names = [kind.name for kind in candidate_types(1_000_000, 512, IndexSettings())]
    assert names[0] == "Flat"
    assert {"IVF4096,SQ8", "IVF4096,RaBitQ", "IVF4096,SQfp16", "IVF1024,SQ8", "HNSW32"} <= set(names)
    assert partition_counts(100_000) == [256, 1024]


def test_a_named_type_must_fit_the_collection():
    with pytest.raises(SettingsError, match="at least 8,192 vectors, found 5,000"):
        candidate_types(5000, 64, IndexSettings(type="IVF1024,SQ8"))


CANDIDATES = [
    # name, recall, memory, milliseconds
    ("Flat", 1.0, 2 << 30, 100.0),
    ("IVF4096,SQ8", 0.99, 512 << 20, 1.0),
    ("IVF4096,RaBitQ", 0.99, 100 << 20, 2.0),
    ("HNSW32", 0.99, 2500 << 20, 0.5),
]


def candidates() -> list[Candidate]:
    return [
        Candidate(
            IndexType.parse(name), Trial(Effort(), recall, SearchWork(0.0, 0.0)), memory, milliseconds / 1000,
            milliseconds / 1000, 1.0,
        )
        for name, recall, memory, milliseconds in CANDIDATES
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, "HNSW32"),  # 0.5 ms for 5 times the memory: cheaper by its fourth root
        ({"ram": "1GiB"}, "IVF4096,SQ8"),
        ({"ram": "200MiB"}, "IVF4096,RaBitQ"),
        ({"latency": "150ms"}, "Flat"),
        ({"latency": "0.8ms"}, "HNSW32"),
        ({"mode": "evaluation"}, "Flat"),
        ({"ram": "80MiB"}, "IVF4096,RaBitQ"),  # misses memory by the least
        ({"ram": "1GiB", "latency": "0.9ms"}, "IVF4096,SQ8"),  # misses latency by the least
        ({"recall": 0.999}, "Flat"),
    ],
)
def test_wishes_decide(wishes, expected):
    settings = validate_settings(IndexSettings, wishes, where="test")
    assert choose(candidates(), settings, ram=settings.ram).index_type.name == expected


def test_impossible_wishes_get_the_nearest_plan_and_what_would_be_enough(monkeypatch):
    monkeypatch.setattr("indexing.planning.candidates.LARGEST_WITHOUT_TRIAL_BYTES", 0)
    store = store_of(clustered()[:3000])
    plan = plan_index(store, IndexSettings(num_measured_queries=50, recall=0.9, ram="20kB", latency="1s"))
    assert not plan.is_reachable
    assert any("Nearest" in line and "misses ram" in line for line in plan.explanation)
    [enough] = [word for line in plan.explanation if "any one of" in line for word in line.split() if "MiB" in word]
    richer = plan_index(store, IndexSettings(num_measured_queries=50, recall=0.9, ram=enough.strip(".,"), latency="1s"))
    assert richer.is_reachable


def test_memory_is_that_of_the_built_index():
    vectors = clustered()[:4000]
    for name in ("IVF64,SQ8", "IVF64,RaBitQ", "IVF64,SQfp16", "HNSW16"):
        store = store_of(vectors)
        searcher = searcher_over(store, name)
        add_what_is_held_out(searcher, store)
        written = load_faiss().serialize_index(searcher.index).nbytes
        assert memory_bytes(IndexType.parse(name), 4000, DIM) == pytest.approx(written, rel=0.15), name


def test_costs_grow_with_what_they_count():
    rates, settings = nominal_rates(512), IndexSettings()
    sq8, flat = IndexType.parse("IVF1024,SQ8"), IndexType("flat")
    few, many = (query_seconds(sq8, SearchWork(n, rescored=26.0), 512, rates, in_batches=False) for n in (1e3, 1e5))
    assert few < many < query_seconds(flat, SearchWork(1e6, 0.0), 512, rates, in_batches=False)
    work = SearchWork(1e5, 0.0)
    alone, together = (query_seconds(flat, work, 512, rates, in_batches=batch) for batch in (False, True))
    assert together < alone / 4
    assert build_seconds(flat, 10**6, 512, rates, settings) == 0
    assert build_seconds(sq8, 10**6, 512, rates, settings) > build_seconds(sq8, 10**5, 512, rates, settings)


@pytest.mark.parametrize(("given", "expected"), [("5ms", 5.0), ("0.5 s", 500.0), (3, 3.0), ("2.5", 2.5)])
def test_latency_is_read_in_milliseconds(given, expected):
    assert validate_settings(IndexSettings, {"latency": given}, where="test").latency == expected


@pytest.mark.parametrize("wish", [{"latency": "fast"}, {"latency": 0}, {"ram": "2 apples"}, {"recall": 1.5}, {"at": 0}])
def test_wishes_that_cannot_be_read_are_refused(wish):
    with pytest.raises(SettingsError, match=next(iter(wish))):
        validate_settings(IndexSettings, wish, where="test")


def test_memory_is_read_in_bytes():
    assert validate_settings(IndexSettings, {"ram": "2GiB"}, where="test").ram == 2 << 30


def test_large_products_are_left_to_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy has one thread in our commands."""
    shapes = []

    def recorded(left: ndarray, right: ndarray) -> ndarray:
        shapes.append((len(left), right.shape[1]))
        return product(left, right)

    monkeypatch.setattr(calibration, "product", recorded)
    monkeypatch.setattr(calibration, "_SECONDS_EACH", 0.001)
    measured = calibration.measure_rates.__wrapped__(8)
    assert set(shapes) == {(256, 16_384)}
    assert measured.flops > 0
    shapes.clear()
    monkeypatch.setattr(trials, "product", recorded)
    vectors, centroids = clustered()[:50], clustered()[50:57]
    nearest = trials.nearest_centroids(vectors, centroids)
    np.testing.assert_array_equal(nearest, (vectors @ centroids.T).argmax(axis=1))
    assert shapes == [(50, 7)]
