from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from indexing.searching import device_gallery, screening
from indexing.searching.exact import ExactSearcher
from indexing.searching.screening import PRODUCTS, Screening, calibrated_costs, fastest_product, measure_norms
from indexing.vector_store import VectorStore
from lookalike import exact_search as kernel
from lookalike.filters import OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import SearchHits, SearchParameters


def full_sort(queries: ndarray, store: VectorStore, k: int, among: IdSelection | None = None) -> SearchHits:
    """The oracle: float64 products of everything, a stable sort by (-score, id)."""
    vectors, ids = np.asarray(store.vectors, np.float64), np.asarray(store.ids)
    if among is not None:
        is_kept = np.array([(int(i) in set(among.ids.tolist())) != among.excludes for i in ids], bool)
        vectors, ids = vectors[is_kept], ids[is_kept]
    scores = np.array([[float(np.float32(np.dot(v, q))) for v in vectors] for q in queries.astype(np.float64)])
    answer = SearchHits(np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, np.float32))
    for row in range(len(queries)):
        best = sorted(zip(-scores[row], ids, strict=True))[:k] if len(ids) else []
        answer.ids[row, : len(best)] = [identifier for _, identifier in best]
        answer.scores[row, : len(best)] = [-score for score, _ in best]
    return answer


def assert_equal(found: SearchHits, expected: SearchHits) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


@settings(max_examples=60, deadline=None)
@given(
    num_vectors=st.integers(0, 60),
    num_queries=st.integers(0, 20),
    k=st.integers(1, 70),
    block_rows=st.integers(1, 70),
    precision=st.sampled_from(["auto", "float32", "bfloat16"]),
    stored=st.sampled_from([np.float32, np.float16]),
    selects=st.sampled_from(["all", "only", "all but"]),
    seed=st.integers(0, 10_000),
)
def test_every_precision_equals_a_full_sort(  # type: ignore[no-untyped-def]
    num_vectors, num_queries, k, block_rows, precision, stored, selects, seed
):
    generator = np.random.default_rng(seed)
    # Multiples of 1/4 make many exact ties, and products without rounding in float64.
    vectors = (generator.integers(-4, 5, (num_vectors, 5)) / 4).astype(stored)
    store = VectorStore.of(vectors, generator.choice(2**40, num_vectors, replace=False))
    queries = generator.normal(size=(num_queries, 5)).astype(np.float32)
    listed = np.concatenate([store.ids[generator.random(num_vectors) < 0.4], [2**41]]).astype(np.int64)
    among = {"all": None, "only": IdSelection.only(listed), "all but": IdSelection.all_but(listed)}[selects]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_ROWS_OF_FIRST_BLOCK", min(block_rows, 7))
        patch.setattr(kernel, "_MOST_ROWS_OF_BLOCK", block_rows)
        searcher = ExactSearcher(store, precision=precision)
        hits = searcher.search(queries, SearchParameters(k=k, among=among))
    expected = full_sort(queries, store, k, among)
    np.testing.assert_allclose(hits.scores, expected.scores, rtol=1e-6)
    rounded_away = hits.scores != expected.scores  # sums of five in another order may be rounded to a neighbour
    assert rounded_away.mean() < 0.01 if rounded_away.size > 200 else rounded_away.sum() <= 2
    if not rounded_away.any():
        np.testing.assert_array_equal(hits.ids, expected.ids)


@pytest.mark.parametrize("dim", [3, 64, 500])
@pytest.mark.parametrize("spread", ["isotropic", "copies", "one direction", "not normalised"])
def test_bfloat16_and_float32_and_every_batch_size_agree_to_the_last_bit(dim: int, spread: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(dim)
    vectors = generator.normal(size=(5000, dim)).astype(np.float32)
    if spread == "copies":
        vectors = vectors[generator.integers(0, 40, 5000)]
    if spread == "one direction":
        vectors = (vectors[0] + 1e-3 * vectors).astype(np.float32)  # scores differ by less than bfloat16 can tell
    if spread != "not normalised":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "vectors.npy", vectors)
    np.save(tmp_path / "ids.npy", np.arange(5000) * 7)
    store = VectorStore.open(tmp_path)  # memory-mapped and read-only, as in an index
    queries = vectors[:40] + (0.1 * generator.normal(size=(40, dim))).astype(np.float32)
    float32, bfloat16 = (ExactSearcher(store, precision=p) for p in ("float32", "bfloat16"))
    expected = float32.search(queries, SearchParameters(k=50))
    assert_equal(bfloat16.search(queries, SearchParameters(k=50)), expected)
    for searcher in (float32, bfloat16, ExactSearcher(store)):
        rows = [searcher.search(queries[row : row + 1], SearchParameters(k=50)) for row in range(3)]
        assert_equal(
            SearchHits(*(np.concatenate(p) for p in zip(*((r.ids, r.scores) for r in rows), strict=True))),
            SearchHits(expected.ids[:3], expected.scores[:3]),
        )
    order = generator.permutation(5000)
    shuffled = VectorStore.of(vectors[order], np.arange(5000)[order] * 7)
    assert_equal(ExactSearcher(shuffled).search(queries, SearchParameters(k=50)), expected)
    true_best = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32).max(axis=1)
    np.testing.assert_allclose(expected.scores[:, 0], true_best, rtol=1e-7)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("num_queries", [1, 17])
def test_screening_stays_within_its_bounds(product: screening.Product, num_queries: int) -> None:
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(num_queries, 700)).astype(np.float32)
    block = (generator.normal(size=(900, 700)) * 10 ** generator.uniform(-3, 2, (900, 1))).astype(np.float32)
    bounds = Screening(queries, measure_norms(block), product=product)
    true_scores = queries.astype(np.float64) @ block.astype(np.float64).T
    found = bounds.scores(block)
    allowed = bounds.absolute_error[:, None] + bounds.relative_error * np.abs(found)
    assert (np.abs(found - true_scores) <= allowed).all()
    if product == "bfloat16":  # whose bound must not let too many through
        assert allowed.max() < 20 * np.abs(found - true_scores).max()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_screening_in_float16_gives_the_same_answers(  # type: ignore[no-untyped-def]
    device: str, stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would do; the same lines run here, on whatever computes."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(3000, 48))
    vectors[500:800] = vectors[500] + 1e-3 * vectors[500:800]  # closer together than float16 can tell
    vectors[900:950] = vectors[900]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(stored)
    store = VectorStore.of(vectors, generator.permutation(3000).astype(np.int64))
    queries = vectors[490:910:10].astype(np.float32)
    monkeypatch.setattr(device_gallery, "_ROWS_OF_FIRST_BLOCK", 100)
    monkeypatch.setattr(device_gallery, "_ROWS_OF_BLOCK", 700)
    monkeypatch.setattr(
        device_gallery.DeviceGallery, "of", lambda vectors, norms: device_gallery.DeviceGallery(vectors, device=device)
    )
    for k in (1, 30, 3100):
        expected = ExactSearcher(store, precision="float32").search(queries, SearchParameters(k=k))
        assert_equal(ExactSearcher(store).search(queries, SearchParameters(k=k)), expected)
    huge = 1e4 * queries  # beyond float16
    assert_equal(
        ExactSearcher(store).search(huge, SearchParameters()),
        ExactSearcher(store, precision="float32").search(huge, SearchParameters()),
    )


def test_thousands_of_copies_are_told_apart_by_id_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LARGEST_POOL", 500)
    generator = np.random.default_rng(0)
    vectors = np.tile(generator.normal(size=(1, 16)).astype(np.float32), (9000, 1))
    store = VectorStore.of(vectors, generator.permutation(9000).astype(np.int64))
    for precision in ("float32", "bfloat16"):
        hits = ExactSearcher(store, precision=precision).search(vectors[:3], SearchParameters(k=20))
        assert (hits.ids == np.arange(20)).all()


def test_the_way_that_was_measured_to_be_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = calibrated_costs(48)
    assert set(costs) == set(PRODUCTS)
    assert all(fixed >= 0 and each >= 0 and fixed + each > 0 for fixed, each in costs.values())
    assert calibrated_costs(48) is costs  # once per process
    measured = {"vector": (0.0, 10.0), "float32": (25.0, 3.0), "bfloat16": (30.0, 1.0)}
    monkeypatch.setattr(screening, "calibrated_costs", lambda dim: measured)
    assert [fastest_product(size, 48) for size in (1, 3, 4, 300)] == ["vector", "vector", "bfloat16", "bfloat16"]
    among = ("vector", "float32")
    assert [fastest_product(size, 48, among=among) for size in (3, 4, 300)] == ["vector", "float32", "float32"]


def test_what_cannot_be_searched_is_refused() -> None:
    store = VectorStore.of(np.eye(4, dtype=np.float32), np.arange(4))
    searcher = ExactSearcher(store)
    with pytest.raises(ValueError, match="metadata"):
        searcher.search(np.ones((1, 4), np.float32), SearchParameters(filter=OneOf("a", (1,))))
    with pytest.raises(ValueError, match=r"length 4"):
        searcher.search(np.ones((1, 5), np.float32), SearchParameters())
    with pytest.raises(ValueError, match="NaN"):
        searcher.search(np.full((1, 4), np.inf, np.float32), SearchParameters())
    with pytest.raises(ValueError, match="unit length"):
        searcher.search(np.full((1, 4), 1e30, np.float32), SearchParameters())
    with pytest.raises(ValueError, match="not finite"):
        ExactSearcher(VectorStore.of(np.full((3, 2), np.nan, np.float32), np.arange(3))).search(
            np.ones((1, 2), np.float32), SearchParameters()
        )
    with pytest.raises(KeyError):
        searcher.vectors_of(np.array([9]))
