"""A gallery in Milvus, against a full sort and a row-by-row reading of filters; the engine is milvus-lite."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy import ndarray

pytest.importorskip("pymilvus", reason="needs the extra [milvus-lite]")
pytest.importorskip("milvus_lite", reason="needs the extra [milvus-lite]")

from indexing.index_types import IndexType
from indexing.searching.filtering import matching_rows
from indexing.searching.milvus import MilvusSearcher
from indexing.searching.milvus_expressions import MAX_LISTED_IDS
from indexing.searching.milvus_layout import columns_of
from indexing.searching.milvus_loading import load_into_milvus
from lookalike.errors import DataError, SettingsError
from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import Effort, SearchParameters
from tests.unit.indexing.milvus_gallery import DIM, HOSTILE, NUM_VECTORS, Gallery, write_gallery

pytestmark = pytest.mark.usefixtures("few_measured_queries")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    from milvus_lite.server_manager import server_manager_instance

    gallery = write_gallery(tmp_path_factory.mktemp("milvus"))
    yield gallery
    server_manager_instance.release_server(gallery.uri)


@pytest.fixture(scope="module")
def flat(gallery: Gallery) -> Iterator[MilvusSearcher]:
    with load_into_milvus(gallery.source, gallery.uri, "flat", IndexType.parse("Flat")) as searcher:
        yield searcher


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[tuple[Gallery, MilvusSearcher]]:
    """A gallery of its own for tests that write."""
    gallery = write_gallery(tmp_path)
    with load_into_milvus(gallery.source, gallery.uri, "changing", IndexType.parse("Flat")) as searcher:
        yield gallery, searcher


def full_sort(queries: ndarray, vectors: ndarray, ids: ndarray, k: int) -> list[list[int]]:
    """The k best by scores rounded from float64 to float32; equal ones by id."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return [ids[np.lexsort((ids, -row))][:k].tolist() for row in scores]


def some_queries(gallery: Gallery, count: int = 5) -> ndarray:
    generator = np.random.default_rng(1)
    queries = gallery.vectors[98 : 98 + count] + 0.2 * generator.normal(size=(count, DIM)).astype(np.float32)
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def fits(condition: Filter, row: dict[str, Any]) -> bool:
    """What a filter means, read cell by cell."""
    match condition:
        case AllOf(parts):
            return all(fits(part, row) for part in parts)
        case AnyOf(parts):
            return any(fits(part, row) for part in parts)
        case Not(part):
            return not fits(part, row)
        case OneOf(column, values):
            return row[column] in values
        case Between(column, at_least, at_most, above, below):
            cell = row[column]
            return (
                cell is not None
                and (at_least is None or cell >= at_least)
                and (at_most is None or cell <= at_most)
                and (above is None or cell > above)
                and (below is None or cell < below)
            )
    raise AssertionError(condition)


NUMBERS = [-1.5, 0.0, 0.1, 1e-300, 2.0, 0.5, -3, 2, float("inf"), float("-inf")]

CELLS: dict[str, list[Any]] = {
    "name": HOSTILE,
    "width": [*range(-4, 5), *NUMBERS, 2**63, -(2**63) - 1, 2**80],
    "share": NUMBERS,
    "is old": [True, False],
}


def draw_filter(random: Random, depth: int = 3) -> Filter:
    """By a generator of our own: the client draws from Python's, which Hypothesis watches."""
    kind = random.choice(["one of", "between", "not", "all", "any"] if depth else ["one of", "between"])
    if kind == "not":
        return Not(draw_filter(random, depth - 1))
    if kind in ("all", "any"):
        parts = tuple(draw_filter(random, depth - 1) for _ in range(random.randint(0, 3)))
        return AllOf(parts) if kind == "all" else AnyOf(parts)
    column = random.choice(sorted(CELLS))
    cells = CELLS[column]
    if kind == "one of" or column == "is old":
        return OneOf(column, tuple(random.choices([*cells, None], k=random.randint(0, 4))))
    return Between(column, *(random.choice([None, random.choice(cells)]) for _ in range(4)))


def test_filters_find_exactly_the_rows_that_fit(gallery: Gallery, flat: MilvusSearcher) -> None:
    table = gallery.source.metadata_of(gallery.ids)
    random, num_found = Random(0), list[int]()
    for _ in range(300):
        condition = draw_filter(random)
        hits = flat.search(gallery.vectors[:1], SearchParameters(k=NUM_VECTORS, filter=condition))
        fitting = [int(i) for i, row in zip(gallery.ids, gallery.rows, strict=True) if fits(condition, row)]
        assert sorted(hits.ids[hits.ids >= 0].tolist()) == sorted(fitting), condition
        assert sorted(gallery.ids[matching_rows(condition, table)].tolist()) == sorted(fitting), condition
        num_found.append(len(fitting))
    # The filters drawn are neither all empty nor all true.
    assert sum(0 < found < NUM_VECTORS for found in num_found) > 100


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_compared_as_it_is(gallery: Gallery, flat: MilvusSearcher, text: str) -> None:
    hits = flat.search(gallery.vectors[:1], SearchParameters(k=NUM_VECTORS, filter=OneOf("name", (text,))))
    wanted = [int(i) for i, row in zip(gallery.ids, gallery.rows, strict=True) if row["name"] == text]
    assert wanted
    assert sorted(hits.ids[hits.ids >= 0].tolist()) == sorted(wanted)


def test_a_filter_on_an_unknown_column_or_of_another_kind_is_refused(gallery: Gallery, flat: MilvusSearcher) -> None:
    for condition, message in (
        (OneOf("colour", ("red",)), "no column 'colour'.*is old"),
        (OneOf("width", ("red",)), "column width holds whole numbers"),
        (OneOf("is old", (1,)), "column is old holds true or false"),
        (Between("name", at_least=3), "column name holds text"),
        (Between("width", below=float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            flat.search(gallery.vectors[:1], SearchParameters(filter=condition))


@pytest.mark.parametrize("type_name", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("k", [1, 10, 45, NUM_VECTORS, 600])
def test_exact_search_equals_a_full_sort(gallery: Gallery, type_name: str, k: int) -> None:
    """Also where more vectors tie with the k-th than are fetched at first, and k exceeds the gallery."""
    name = type_name.replace(",", "_")
    searcher = load_into_milvus(gallery.source, gallery.uri, name, IndexType.parse(type_name))
    queries = np.concatenate([some_queries(gallery), gallery.vectors[100:101]])
    hits = searcher.search(queries, SearchParameters(k=k, exact=True))
    expected = full_sort(queries, gallery.vectors, gallery.ids, k)
    assert hits.ids.shape == hits.scores.shape == (len(queries), k)
    for found, scores, wanted, query in zip(hits.ids, hits.scores, expected, queries, strict=True):
        assert found[: len(wanted)].tolist() == wanted
        assert (found[len(wanted) :] == -1).all()
        assert np.isneginf(scores[len(wanted) :]).all()
        np.testing.assert_allclose(scores[: len(wanted)], searcher.vectors_of(found[: len(wanted)]) @ query, atol=1e-6)


def test_a_selection_of_ids_is_kept_to(gallery: Gallery, flat: MilvusSearcher) -> None:
    queries, chosen = some_queries(gallery), gallery.ids[::3]
    old = OneOf("is old", (True,))
    is_old = np.array([fits(old, row) for row in gallery.rows])
    for selection, is_chosen in (
        (IdSelection.only(chosen), np.isin(gallery.ids, chosen)),
        (IdSelection.all_but(chosen), ~np.isin(gallery.ids, chosen)),
        (IdSelection.all_but([]), np.ones(NUM_VECTORS, bool)),
        (IdSelection.only([]), np.zeros(NUM_VECTORS, bool)),
    ):
        for condition, is_sought in ((None, is_chosen), (old, is_chosen & is_old)):
            hits = flat.search(queries, SearchParameters(k=20, among=selection, filter=condition))
            expected = full_sort(queries, gallery.vectors[is_sought], gallery.ids[is_sought], 20)
            assert [row[row >= 0].tolist() for row in hits.ids] == expected
    with pytest.raises(ValueError, match="column of metadata"):
        flat.search(queries, SearchParameters(among=IdSelection.only(np.arange(MAX_LISTED_IDS + 1))))


def test_ids_vectors_and_metadata_come_back_as_they_were(gallery: Gallery, flat: MilvusSearcher) -> None:
    assert (flat.num_vectors, flat.dim) == (NUM_VECTORS, DIM)
    np.testing.assert_array_equal(flat.ids(), np.sort(gallery.ids))
    order = np.random.default_rng(2).permutation(NUM_VECTORS)
    np.testing.assert_array_equal(flat.vectors_of(gallery.ids[order]), gallery.vectors[order])
    assert flat.metadata_of(gallery.ids[order]) == [gallery.rows[row] for row in order]
    with pytest.raises(KeyError, match="77777"):
        flat.vectors_of(np.array([gallery.ids[3], 77777]))


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.full((1, DIM), np.nan, np.float32), 3, "NaN"),
        (np.zeros((1, DIM + 1), np.float32), 3, "shape"),
        (np.zeros((1, DIM), np.float32), 20_000, "16,384"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(flat: MilvusSearcher, queries: ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat.search(queries, SearchParameters(k=k))


def test_no_queries_have_no_hits(flat: MilvusSearcher) -> None:
    assert flat.search(np.zeros((0, DIM), np.float32), SearchParameters(k=3)).ids.shape == (0, 3)


def test_a_write_is_seen_by_the_next_search(changing: tuple[Gallery, MilvusSearcher]) -> None:
    gallery, searcher = changing
    query = gallery.vectors[5:6]
    best = SearchParameters(k=1)
    new = np.array([4_000_000, 4_000_001])
    searcher.add(np.concatenate([-query, query]), [{"name": "new"}, {}], ids=new)
    assert searcher.metadata_of(new)[1]["key"] == "4000001"
    # An equal vector with a greater id stands behind the one that was there.
    assert searcher.search(query, SearchParameters(k=2)).ids[0].tolist() == [gallery.ids[5], 4_000_001]
    assert searcher.search(-query, best).ids[0].tolist() == [4_000_000]
    assert searcher.search(query, SearchParameters(k=1, filter=OneOf("name", ("new",)))).ids[0].tolist() == [4_000_000]
    searcher.delete(gallery.ids[5:6])
    assert searcher.search(query, best).ids[0].tolist() == [4_000_001]
    searcher.replace(np.array([4_000_001]), -query, [{"width": 3}])
    assert searcher.search(query, best).ids[0, 0] not in (gallery.ids[5], 4_000_001)
    assert searcher.metadata_of(np.array([4_000_001]))[0]["width"] == 3
    assert searcher.num_vectors == len(searcher.ids()) == NUM_VECTORS + 1
    searcher.delete(searcher.ids())
    assert searcher.num_vectors == len(searcher.ids()) == 0
    assert searcher.search(query, SearchParameters(k=3)).ids[0].tolist() == [-1, -1, -1]


def test_a_write_that_makes_no_sense_changes_nothing(changing: tuple[Gallery, MilvusSearcher]) -> None:
    gallery, searcher = changing
    one = gallery.vectors[:1]
    for ids, vectors, metadata, message in (
        (gallery.ids[:1], one, None, "is in use"),
        (np.array([5, 5]), gallery.vectors[:2], None, "different"),
        (np.array([-5]), one, None, "negative"),
        (np.array([50_000]), one * np.nan, None, "finite and of unit length"),
        (np.array([50_000]), one * 2, None, "unit length, that of row 0 has 2"),
        (np.array([50_000]), one[:, 1:], None, "length 15"),
        (np.array([50_000]), one, [{"colour": 1}], "no column 'colour'"),
        (np.array([50_000]), one, [{"width": 1.5}], "picture 50000, column width: expected a whole number"),
        (np.array([50_000]), one, [{"width": 2**63}], "below 2"),
        (np.array([50_000]), one, [{"share": float("nan")}], "finite"),
        (np.array([50_000]), one, [{"is old": 1}], "true or false"),
        (np.array([50_000]), one, [{"name": "ä" * 40_000}], "80,000 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            searcher.add(vectors, metadata, ids=ids)
    for write in (searcher.delete, lambda ids: searcher.replace(ids, gallery.vectors[:2])):
        with pytest.raises(KeyError, match="50000"):
            write(np.array([gallery.ids[0], 50_000]))
    np.testing.assert_array_equal(searcher.ids(), np.sort(gallery.ids))


@pytest.mark.parametrize("type_name", ["IVF16,Flat", "IVF16,SQ8", "HNSW8", "HNSW8,SQ8"])
def test_an_approximate_index_delivers_its_recall_with_true_scores(gallery: Gallery, type_name: str) -> None:
    name = type_name.replace(",", "_")
    searcher = load_into_milvus(gallery.source, gallery.uri, name, IndexType.parse(type_name), recall=0.9)
    points = searcher.facts.properties.curve.points
    assert points
    assert points[-1].recall >= 0.95
    queries = np.random.default_rng(3).normal(size=(50, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    expected = full_sort(queries, gallery.vectors, gallery.ids, 10)
    for parameters in (SearchParameters(), SearchParameters(recall=0.9)):
        hits = searcher.search(queries, parameters)
        found = np.mean([len(set(row) & set(wanted)) / 10 for row, wanted in zip(hits.ids, expected, strict=True)])
        assert found >= 0.85  # other queries than were measured: 0.9 less their scatter
        for query, ids, scores in zip(queries, hits.ids, hits.scores, strict=True):
            np.testing.assert_allclose(scores, searcher.vectors_of(ids) @ query, atol=1e-6)
    few = gallery.ids[::10]
    expected_few = full_sort(queries, gallery.vectors[::10], few, 10)
    hits = searcher.search(queries, SearchParameters(recall=0.9, among=IdSelection.only(few)))
    found = np.mean([len(set(row) & set(wanted)) / 10 for row, wanted in zip(hits.ids, expected_few, strict=True)])
    assert found >= 0.97 * 0.9
    if type_name == "IVF16,Flat":
        one_probe = searcher.search(queries, SearchParameters(effort=Effort(num_probes=1)))
        assert one_probe.ids.tolist() != expected  # the effort reaches the engine
        assert searcher.search(queries, SearchParameters(recall=1.0)).ids.tolist() == expected
    else:
        for impossible in (SearchParameters(exact=True), SearchParameters(recall=1.0)):
            with pytest.raises(ValueError, match="does not deliver"):
                searcher.search(queries, impossible)


def test_searches_beside_each_other_and_beside_writes_do_not_mix(changing: tuple[Gallery, MilvusSearcher]) -> None:
    gallery, searcher = changing
    queries = some_queries(gallery, 30)
    expected = full_sort(queries, gallery.vectors, gallery.ids, 5)
    done = threading.Event()

    def write() -> None:
        far = np.full((1, DIM), 0.0, np.float32) - queries.mean(axis=0)
        while not done.is_set():
            searcher.add((far / np.linalg.norm(far)).astype(np.float32), ids=np.array([9_000_000]))
            searcher.delete(np.array([9_000_000]))

    with ThreadPoolExecutor(5) as pool:
        writer = pool.submit(write)
        answers = pool.map(
            lambda row: searcher.search(queries[row : row + 1], SearchParameters(k=5 - row % 3)), range(30)
        )
        found = [answer.ids[0].tolist() for answer in answers]
        done.set()
        writer.result()
    assert found == [expected[row][: 5 - row % 3] for row in range(30)]


def test_what_milvus_does_not_have_is_refused_before_it_is_asked(gallery: Gallery) -> None:
    with pytest.raises(SettingsError, match="Milvus has no IVF16,SQfp16"):
        load_into_milvus(gallery.source, gallery.uri, "half", IndexType.parse("IVF16,SQfp16"))
    with pytest.raises(DataError, match="column tags holds list"):
        columns_of(pa.schema([("tags", pa.list_(pa.string()))]))
