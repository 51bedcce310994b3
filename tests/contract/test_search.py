"""One list of cases over every way to search: each must answer as a full sort in float64 would.

A new way is one more entry of `ENGINES`: how it is opened over a gallery, what to ask for so that it is exact (or how
much of the exact answer it must find at least), and what it does not offer.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from numpy import ndarray

from indexing.building.build import build_index
from indexing.index_types import IndexType, create_untrained
from indexing.living.live_index import LiveIndex
from indexing.searching.exact import ExactSearcher
from indexing.searching.faiss_searcher import FaissSearcher
from indexing.searching.recall_curve import MeasuredDepth, RecallCurve
from indexing.searching.searcher import Searcher
from indexing.searching.sharded import ShardedSearcher
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from indexing.vector_store import VectorStore
from lookalike.api_answers import SearchAnswer
from lookalike.api_client import ApiProblem, AsyncApiClient
from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf, to_tree
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import load_faiss
from lookalike.records import Effort, SearchHits, SearchParameters
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.settings import ServingSettings

NUM_VECTORS, DIM, NUM_TWINS = 400, 16, 6
LOCAL = "http://localhost"
EXACT = SearchParameters(exact=True)
# Everything that an approximate index can look at.
FULL_EFFORT = SearchParameters(effort=Effort(num_probes=8, breadth=NUM_VECTORS, candidates_per_hit=NUM_VECTORS))


@dataclass(frozen=True)
class Gallery:
    """Vectors in no order of ids, some of them equal, with metadata; also as files."""

    folder: Path
    vectors: ndarray
    ids: ndarray
    rows: list[dict[str, str | int | None]]

    @property
    def store(self) -> VectorStore:
        return VectorStore.of(self.vectors, self.ids)

    @property
    def source(self) -> ArraySource:
        return ArraySource(*(self.folder / name for name in ("vectors.npy", "ids.npy", "metadata.parquet")))

    @property
    def twins(self) -> list[int]:
        return sorted(self.ids[(self.vectors == self.vectors[self.ids.argmin()]).all(axis=1)].tolist())

    def part(self, rows: Sequence[int] | ndarray | slice) -> VectorStore:
        return VectorStore.of(self.vectors[rows], self.ids[rows])


class CanSearch(Protocol):
    def search(self, queries: ndarray, parameters: SearchParameters) -> SearchHits: ...


@dataclass(frozen=True)
class Engine:
    """One way to search."""

    open: Callable[[Gallery], AbstractContextManager[CanSearch]]
    how: SearchParameters = EXACT
    finds: float = (
        1.0  # the least share of the exact answer under `how`; below 1 nothing is promised about a single hit
    )
    takes_filters: bool = False
    is_searcher: bool = True  # the whole protocol: `among`, vectors by id, all ids


def exact_searcher(gallery: Gallery, precision: str) -> AbstractContextManager[Searcher]:
    return nullcontext(ExactSearcher(gallery.store, precision=precision))  # type: ignore[arg-type]


def sharded(gallery: Gallery) -> AbstractContextManager[Searcher]:
    """One of the parts holds nothing."""
    parts = [gallery.part(slice(0, 0)), *(gallery.part(slice(start, None, 3)) for start in range(3))]
    return nullcontext(ShardedSearcher([ExactSearcher(part) for part in parts]))


def faiss_searcher(gallery: Gallery, type_name: str) -> AbstractContextManager[Searcher]:
    index_type, store = IndexType.parse(type_name), gallery.store
    index = None
    if index_type.family != "flat":
        index = create_untrained(index_type, DIM, seed=0)
        index.train(store.vectors)
        if index_type.family == "hnsw":
            index = load_faiss().IndexIDMap(index)
        index.add_with_ids(store.vectors, store.ids)
    return nullcontext(
        FaissSearcher(index, index_type, store, [MeasuredDepth(10, RecallCurve(), Effort(num_probes=1, breadth=8))])
    )


def published(gallery: Gallery, type_name: str) -> AbstractContextManager[Searcher]:
    folder = gallery.folder / type_name.replace(",", "_")
    return nullcontext(build_index(gallery.source, folder, IndexSettings(type=type_name, recall=0.5)))


@contextmanager
def live(gallery: Gallery) -> Iterator[Searcher]:
    """A third of the vectors was added, and another third replaced, after the version was published."""
    folder, count = gallery.folder / "live", len(gallery.ids) // 3
    before = write_gallery(folder, gallery.vectors[count:], gallery.ids[count:], gallery.rows[count:])
    others = slice(0, count)
    np.save(folder / "vectors.npy", np.concatenate([gallery.vectors[others], before.vectors[count:]]))
    build_index(before.source, folder / "index", IndexSettings(type="IVF2,SQ8", recall=0.5))
    index = LiveIndex.open(folder / "index")
    index.add(gallery.vectors[:count], gallery.rows[:count], ids=gallery.ids[:count])
    replaced = slice(count, 2 * count)
    index.replace(gallery.ids[replaced], gallery.vectors[replaced], gallery.rows[replaced])
    extra = index.add(np.eye(3, DIM, dtype=np.float32), [{}, {}, {}])
    index.delete(extra)
    yield index
    index.close()


class OverHttp:
    """Asks the API by hand: the client's own encoder refuses NaN, and the server would never be asked."""

    def __init__(self, client: TestClient) -> None:
        self._client = client

    def search(self, queries: ndarray, parameters: SearchParameters) -> SearchHits:
        rows = []
        for query in queries:
            body = {"vector": query.tolist(), "k": parameters.k, "exact": parameters.exact}
            if parameters.filter is not None:
                body["filter"] = to_tree(parameters.filter)
            answer = self._client.post(
                "/v1/search", content=json.dumps(body), headers={"content-type": "application/json"}
            )
            if answer.status_code != 200:
                raise ValueError(answer.json()["detail"])
            rows.append([(hit["id"], hit["score"]) for hit in answer.json()["hits"]])
        return padded(rows, parameters.k)


class OverClient:
    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport

    def search(self, queries: ndarray, parameters: SearchParameters) -> SearchHits:
        filter_tree = None if parameters.filter is None else to_tree(parameters.filter)

        async def search_all() -> list[SearchAnswer]:
            async with AsyncApiClient(LOCAL, transport=self._transport) as client:
                searches = (
                    client.search(vector=query, k=parameters.k, exact=parameters.exact, filter=filter_tree)
                    for query in queries
                )
                return await asyncio.gather(*searches)

        try:
            answers = asyncio.run(search_all())
        except ApiProblem as problem:
            raise ValueError(problem.detail) from problem
        return padded([[(hit.id, hit.score) for hit in answer.hits] for answer in answers], parameters.k)


@contextmanager
def served(gallery: Gallery, wrap: Callable[[TestClient], CanSearch]) -> Iterator[CanSearch]:
    with published(gallery, "IVF4,SQ8"):
        settings = ServingSettings(index=gallery.folder / "IVF4_SQ8")
    app = create_app(QueryEngine.open(settings.index), settings)
    with TestClient(app, base_url=LOCAL) as client:
        yield wrap(client)


@contextmanager
def milvus(gallery: Gallery, type_name: str) -> Iterator[Searcher]:
    pytest.importorskip("milvus_lite", reason="needs the extra [milvus-lite]")
    from indexing.searching.milvus_loading import load_into_milvus

    address = str(gallery.folder / f"{type_name}.db")
    with load_into_milvus(gallery.source, address, "gallery", IndexType.parse(type_name)) as searcher:
        yield searcher


def padded(rows: list[list[tuple[int, float]]], k: int) -> SearchHits:
    """The API returns what there is."""
    ids = np.array([[identifier for identifier, _ in row] + [-1] * (k - len(row)) for row in rows])
    scores = np.array([[score for _, score in row] + [-np.inf] * (k - len(row)) for row in rows], np.float32)
    return SearchHits(ids=ids, scores=scores)


ENGINES = {
    "exact": Engine(lambda gallery: exact_searcher(gallery, "auto")),
    "exact, float32": Engine(lambda gallery: exact_searcher(gallery, "float32"), how=SearchParameters()),
    "exact, bfloat16": Engine(lambda gallery: exact_searcher(gallery, "bfloat16")),
    "sharded": Engine(sharded),
    "Flat": Engine(lambda gallery: faiss_searcher(gallery, "Flat"), how=SearchParameters()),
    "IVF, exact": Engine(lambda gallery: faiss_searcher(gallery, "IVF8,SQ8")),
    # All partitions are visited and all candidates scored exactly.
    "IVF, Flat": Engine(lambda gallery: faiss_searcher(gallery, "IVF8,Flat"), how=FULL_EFFORT),
    "IVF, SQfp16": Engine(lambda gallery: faiss_searcher(gallery, "IVF8,SQfp16"), how=FULL_EFFORT),
    "IVF, SQ8": Engine(lambda gallery: faiss_searcher(gallery, "IVF8,SQ8"), how=FULL_EFFORT),
    "IVF, RaBitQ": Engine(lambda gallery: faiss_searcher(gallery, "IVF8,RaBitQ"), how=FULL_EFFORT),
    # A walk through a graph may miss a vector that no other one points to.
    "HNSW": Engine(lambda gallery: faiss_searcher(gallery, "HNSW16"), how=FULL_EFFORT, finds=0.99),
    "HNSW, SQ8": Engine(lambda gallery: faiss_searcher(gallery, "HNSW16,SQ8"), how=FULL_EFFORT, finds=0.99),
    "published Flat": Engine(lambda gallery: published(gallery, "Flat"), takes_filters=True),
    "published IVF": Engine(lambda gallery: published(gallery, "IVF4,RaBitQ"), takes_filters=True),
    "published HNSW": Engine(lambda gallery: published(gallery, "HNSW8"), takes_filters=True),
    "live": Engine(live, takes_filters=True),
    "Milvus Flat": Engine(lambda gallery: milvus(gallery, "Flat"), takes_filters=True),
    "Milvus IVF": Engine(lambda gallery: milvus(gallery, "IVF8,Flat"), takes_filters=True),
    "HTTP": Engine(lambda gallery: served(gallery, OverHttp), takes_filters=True, is_searcher=False),
    "API client": Engine(
        lambda gallery: served(gallery, lambda client: OverClient(httpx2.ASGITransport(client.app))),
        takes_filters=True,
        is_searcher=False,
    ),
}


def write_gallery(folder: Path, vectors: ndarray, ids: ndarray, rows: list[dict[str, str | int | None]]) -> Gallery:
    folder.mkdir()
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "ids.npy", ids)
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return Gallery(folder, vectors, ids, rows)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(NUM_VECTORS, DIM)).astype(np.float32)
    ids = generator.permutation(10 * NUM_VECTORS)[:NUM_VECTORS].astype(np.int64)
    ids[7] = 2**62 + 1  # needs all of its 64 bits
    places = np.append(generator.choice(NUM_VECTORS, NUM_TWINS - 1, replace=False), ids.argmin())
    vectors[places] = vectors[ids.argmin()]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows: list[dict[str, str | int | None]] = [
        {"key": f"{row}.jpg", "name": f"class {row % 7}", "width": None if row % 5 == 0 else 10 * (row % 40)}
        for row in range(NUM_VECTORS)
    ]
    return write_gallery(tmp_path_factory.mktemp("galleries") / "gallery", vectors, ids, rows)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def searcher(engine: Engine, gallery: Gallery) -> Iterator[CanSearch]:
    with engine.open(gallery) as opened:
        yield opened


def some_queries(gallery: Gallery, count: int = 6) -> ndarray:
    generator = np.random.default_rng(1)
    queries = gallery.vectors[:count] + 0.3 * generator.normal(size=(count, DIM)).astype(np.float32)
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def full_sort(gallery: Gallery, queries: ndarray, k: int, *, rows: ndarray | None = None) -> SearchHits:
    """The oracle: products in float64, rounded to float32, sorted in Python by (-score, id)."""
    kept = np.arange(len(gallery.ids)) if rows is None else rows
    scores = (queries.astype(np.float64) @ gallery.vectors[kept].astype(np.float64).T).astype(np.float32)
    answers = [
        sorted(zip((-row).tolist(), gallery.ids[kept].tolist(), strict=True))[:k] if len(kept) else [] for row in scores
    ]
    return padded([[(identifier, -score) for score, identifier in row] for row in answers], k)


def assert_finds(engine: Engine, hits: SearchHits, truth: SearchHits) -> None:
    assert hits.ids.shape == hits.scores.shape == truth.ids.shape
    assert (np.isneginf(hits.scores) == (hits.ids < 0)).all()
    for found, scores, wanted in zip(hits.ids, hits.scores, truth.ids, strict=True):
        assert len(set(found[found >= 0].tolist())) == (found >= 0).sum(), "an id twice"
        assert (found[(found >= 0).sum() :] == -1).all(), "-1 before a hit"
        order = sorted(zip((-scores).tolist(), found.tolist(), strict=True), key=lambda pair: (pair[0], pair[1]))
        assert order == list(zip((-scores).tolist(), found.tolist(), strict=True)), "not best first, ties by id"
        assert np.isin(wanted[wanted >= 0], found).mean() >= engine.finds if (wanted >= 0).any() else True
    if engine.finds == 1:
        np.testing.assert_array_equal(hits.ids, truth.ids)
        # HTTP scales vectors to unit length once more, which may change the last bit of each number.
        np.testing.assert_allclose(hits.scores, truth.scores, rtol=0, atol=1e-7)


@pytest.mark.parametrize("k", [1, 7, NUM_VECTORS, NUM_VECTORS + 100])
def test_hits_are_those_of_a_full_sort(engine: Engine, searcher: CanSearch, gallery: Gallery, k: int) -> None:
    queries = some_queries(gallery, 6 if k < NUM_VECTORS else 2)
    assert_finds(engine, searcher.search(queries, replace(engine.how, k=k)), full_sort(gallery, queries, k))


def test_equal_vectors_are_all_found_in_the_order_of_their_ids(
    engine: Engine, searcher: CanSearch, gallery: Gallery
) -> None:
    query = gallery.vectors[gallery.ids.argmin()][None]
    assert len(gallery.twins) == NUM_TWINS
    for k in (NUM_TWINS, NUM_TWINS - 2):
        hits = searcher.search(query, replace(engine.how, k=k))
        assert hits.ids[0].tolist() == gallery.twins[:k]


def test_a_gallery_in_another_order_gives_the_same_answer(
    engine: Engine, searcher: CanSearch, gallery: Gallery, tmp_path: Path
) -> None:
    order = np.random.default_rng(2).permutation(NUM_VECTORS)
    permuted = write_gallery(
        tmp_path / "permuted", gallery.vectors[order], gallery.ids[order], [gallery.rows[row] for row in order]
    )
    queries, parameters = some_queries(gallery), replace(engine.how, k=20)
    expected = searcher.search(queries, parameters)
    with engine.open(permuted) as other:
        hits = other.search(queries, parameters)
    assert_finds(engine, hits, full_sort(gallery, queries, 20))
    if engine.finds == 1:
        np.testing.assert_array_equal(hits.ids, expected.ids)
        np.testing.assert_array_equal(hits.scores, expected.scores)


def test_a_batch_gives_the_same_answers_as_its_queries_one_by_one(
    engine: Engine, searcher: CanSearch, gallery: Gallery
) -> None:
    queries, parameters = some_queries(gallery, 40), replace(engine.how, k=5)
    together = searcher.search(queries, parameters)
    alone = [searcher.search(query[None], parameters) for query in queries]
    np.testing.assert_array_equal(together.ids, np.concatenate([hits.ids for hits in alone]))
    np.testing.assert_array_equal(together.scores, np.concatenate([hits.scores for hits in alone]))


@pytest.mark.parametrize(
    "query", [np.full((1, DIM), np.nan), np.full((1, DIM), np.inf), np.zeros((1, 5)), np.ones((1, DIM + 1))]
)
def test_queries_that_cannot_be_compared_are_refused(engine: Engine, searcher: CanSearch, query: ndarray) -> None:
    with pytest.raises(ValueError, match=r"NaN|finite|length"):
        searcher.search(query.astype(np.float32), replace(engine.how, k=3))


@pytest.mark.parametrize(
    ("condition", "fits"),
    [
        (OneOf("name", ("class 3",)), lambda row: row["name"] == "class 3"),
        (OneOf("name", ("class 1", "class 2", "no such class")), lambda row: row["name"] in ("class 1", "class 2")),
        (OneOf("width", (None,)), lambda row: row["width"] is None),
        (Between("width", at_least=100, below=200), lambda row: row["width"] is not None and 100 <= row["width"] < 200),
        (Not(Between("width", above=30)), lambda row: row["width"] is None or row["width"] <= 30),
        (
            AllOf((AnyOf((OneOf("name", ("class 5",)), OneOf("width", (10,)))), Not(OneOf("key", ("5.jpg",))))),
            lambda row: (row["name"] == "class 5" or row["width"] == 10) and row["key"] != "5.jpg",
        ),
        (OneOf("name", ("nothing",)), lambda row: False),
    ],
)
def test_filters_are_kept_to(
    engine: Engine,
    searcher: CanSearch,
    gallery: Gallery,
    condition: Filter,
    fits: Callable[[dict[str, str | int | None]], bool],
) -> None:
    queries, parameters = some_queries(gallery), replace(engine.how, k=9, filter=condition)
    if not engine.takes_filters:
        with pytest.raises(ValueError, match="metadata"):
            searcher.search(queries, parameters)
        return
    rows = np.array([row for row, values in enumerate(gallery.rows) if fits(values)], np.int64)
    assert_finds(engine, searcher.search(queries, parameters), full_sort(gallery, queries, 9, rows=rows))


def test_a_filter_on_an_unknown_column_is_refused(engine: Engine, searcher: CanSearch, gallery: Gallery) -> None:
    condition = OneOf("colour", ("red",))
    with pytest.raises(ValueError, match=r"colour|metadata"):
        searcher.search(some_queries(gallery), replace(engine.how, filter=condition))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("excludes", [False, True])
def test_a_selection_of_ids_is_kept_to(
    engine: Engine, searcher: CanSearch, gallery: Gallery, share: float, excludes: bool
) -> None:
    if not engine.is_searcher:
        pytest.skip("ids are selected inside a process only")
    queries = some_queries(gallery)
    is_listed = np.random.default_rng(3).random(NUM_VECTORS) < share
    listed = np.append(gallery.ids[is_listed], 10**12)  # and an id that is not there
    selection = IdSelection.all_but(listed) if excludes else IdSelection.only(listed)
    hits = searcher.search(queries, replace(engine.how, k=9, among=selection))
    assert_finds(engine, hits, full_sort(gallery, queries, 9, rows=np.flatnonzero(is_listed != excludes)))


def test_no_queries_have_no_hits(engine: Engine, searcher: CanSearch) -> None:
    if engine.is_searcher:
        assert searcher.search(np.zeros((0, DIM), np.float32), replace(engine.how, k=4)).ids.shape == (0, 4)


def test_vectors_and_ids_come_back_as_they_were(engine: Engine, searcher: Searcher, gallery: Gallery) -> None:
    if not engine.is_searcher:
        pytest.skip("the API gives pictures and metadata, not vectors")
    np.testing.assert_array_equal(searcher.ids(), np.sort(gallery.ids))
    assert (searcher.num_vectors, searcher.dim) == (NUM_VECTORS, DIM)
    rows = np.array([5, 0, 7, 5])
    np.testing.assert_array_equal(searcher.vectors_of(gallery.ids[rows]), gallery.vectors[rows])
    assert searcher.vectors_of(gallery.ids[:0]).shape == (0, DIM)
    with pytest.raises(KeyError, match=str(10**12)):
        searcher.vectors_of(np.array([gallery.ids[0], 10**12]))


def nothing_live(folder: Path) -> Searcher:
    """A live index whose vectors were all deleted."""
    small = write_gallery(folder, np.eye(3, DIM, dtype=np.float32), np.arange(3), [{"key": str(i)} for i in range(3)])
    build_index(small.source, folder / "index", IndexSettings(type="Flat"))
    index = LiveIndex.open(folder / "index")
    index.delete(np.arange(3))
    return index


EMPTY = {
    "exact": lambda folder: ExactSearcher(nothing()),
    "exact, bfloat16": lambda folder: ExactSearcher(nothing(), precision="bfloat16"),
    "sharded": lambda folder: ShardedSearcher([ExactSearcher(nothing()), ExactSearcher(nothing())]),
    "Flat": lambda folder: FaissSearcher(
        None, IndexType.parse("Flat"), nothing(), [MeasuredDepth(10, RecallCurve(), Effort())]
    ),
    "HNSW": lambda folder: FaissSearcher(
        load_faiss().IndexIDMap(create_untrained(IndexType.parse("HNSW8"), DIM, seed=0)),
        IndexType.parse("HNSW8"),
        nothing(),
        [MeasuredDepth(10, RecallCurve(), Effort(breadth=4))],
    ),
    "live": nothing_live,
}


def nothing() -> VectorStore:
    return VectorStore.of(np.zeros((0, DIM), np.float32), np.zeros(0, np.int64))


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_set_has_no_hits(name: str, tmp_path: Path) -> None:
    searcher = EMPTY[name](tmp_path / "empty")
    for parameters in (SearchParameters(k=3), SearchParameters(k=3, exact=True, among=IdSelection.all_but([1]))):
        hits = searcher.search(np.ones((2, DIM), np.float32), parameters)
        assert (hits.ids == -1).all()
        assert np.isneginf(hits.scores).all()
        assert hits.ids.shape == (2, 3)
    assert len(searcher.ids()) == searcher.num_vectors == 0
    with pytest.raises(KeyError):
        searcher.vectors_of(np.array([1]))
