"""A gallery in Milvus, against a full sort and a row-by-row reading of filters; the engine is milvus-lite."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy import ndarray

pytest.importorskip("pymilvus", reason="needs the extra [milvus-lite]")
pytest.importorskip("milvus_lite", reason="needs the extra [milvus-lite]")

from indexing.__main__ import main
from indexing.index_types import IndexType
from indexing.searching.filtering import matching_rows
from indexing.searching.milvus import MilvusSearcher
from indexing.searching.milvus_collection import MilvusCollection
from indexing.searching.milvus_expressions import MAX_LISTED_IDS, expression_of
from indexing.searching.milvus_layout import columns_of
from indexing.searching.milvus_loading import load_into_milvus
from indexing.sources.arrays import ArraySource
from lookalike.errors import ArtifactError, DataError, ManifestMismatch, ResourceError, SettingsError
from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import Effort, SearchParameters

DIM, NUM_VECTORS, NUM_TWINS = 16, 260, 40
HOSTILE = [
    '"',
    "\\",
    "'",
    '" or id >= 0 or name == "',
    "a\\",
    "\n",
    "\t\r",
    "é",
    "\U0001f600",
    "%",
    "{x}",
    "",
    "\x01",
    "in",
]


@dataclass(frozen=True)
class Gallery:
    folder: Path
    vectors: ndarray
    ids: ndarray
    rows: list[dict[str, Any]]  # metadata, one per vector
    source: ArraySource

    @property
    def uri(self) -> str:
        return str(self.folder / "milvus.db")


def write_gallery(folder: Path) -> Gallery:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(NUM_VECTORS, DIM)).astype(np.float32)
    vectors[100 : 100 + NUM_TWINS] = vectors[100]  # more twins than a search fetches beyond k
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = generator.permutation(10 * NUM_VECTORS)[:NUM_VECTORS].astype(np.int64)
    ids[0] = 2**62 + 1  # needs all of its 64 bits
    rows = [
        {
            "key": f"picture{row}",
            "name": None if row % 9 == 0 else HOSTILE[row % len(HOSTILE)],
            "width": None if row % 5 == 0 else int(generator.integers(-3, 4)),
            "share": None if row % 6 == 0 else float(generator.choice([-1.5, 0.0, 0.1, 1e-300, 2.0])),
            "is old": None if row % 4 == 0 else bool(row % 3),
            "Vector": f"v{row % 3}",
        }
        for row in range(NUM_VECTORS)
    ]
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "ids.npy", ids)
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    source = ArraySource(folder / "vectors.npy", folder / "ids.npy", folder / "metadata.parquet")
    return Gallery(folder, vectors, ids, rows, source)


@pytest.fixture(autouse=True)
def few_measured_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexing.searching.milvus_loading._NUM_MEASURED_QUERIES", 50)


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


def test_an_interrupted_load_is_not_served_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = write_gallery(tmp_path)
    upsert, written = MilvusCollection.upsert, list[int]()

    def failing(collection: MilvusCollection, rows: list[dict[str, Any]]) -> None:
        if len(written) >= 100:
            raise ResourceError("the server went away")
        upsert(collection, rows)
        written.extend(row["id"] for row in rows)

    monkeypatch.setattr("indexing.searching.milvus_loading._ROWS_PER_BATCH", 50)
    monkeypatch.setattr(MilvusCollection, "upsert", failing)
    flat = IndexType.parse("Flat")
    with pytest.raises(ResourceError, match="went away"):
        load_into_milvus(gallery.source, gallery.uri, "cut", flat)
    with pytest.raises(ArtifactError, match="interrupted"):
        MilvusSearcher.open(gallery.uri, "cut")
    again: list[int] = []
    monkeypatch.setattr(
        MilvusCollection,
        "upsert",
        lambda collection, rows: (again.extend(row["id"] for row in rows), upsert(collection, rows)),
    )
    with load_into_milvus(gallery.source, gallery.uri, "cut", flat) as searcher:
        np.testing.assert_array_equal(searcher.ids(), np.sort(gallery.ids))
        np.testing.assert_array_equal(searcher.vectors_of(gallery.ids), gallery.vectors)
    assert len(written) == 100
    assert set(written) | set(again) == set(gallery.ids.tolist())
    assert not set(written) & set(again)
    # Loaded to the end: a deletion since then is not undone.
    with MilvusSearcher.open(gallery.uri, "cut") as searcher:
        searcher.delete(gallery.ids[:1])
    with load_into_milvus(gallery.source, gallery.uri, "cut", flat) as searcher:
        assert searcher.num_vectors == NUM_VECTORS - 1
    with pytest.raises(ManifestMismatch, match="IVF4,Flat"):
        load_into_milvus(gallery.source, gallery.uri, "cut", IndexType.parse("IVF4,Flat"))


def test_a_load_that_ended_before_the_index_was_made_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = write_gallery(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(MilvusCollection, "ensure_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_into_milvus(gallery.source, gallery.uri, "bare", IndexType.parse("Flat"))
    with load_into_milvus(gallery.source, gallery.uri, "bare", IndexType.parse("Flat")) as searcher:
        assert searcher.num_vectors == NUM_VECTORS
        searcher.collection._client.release_collection("bare")
        searcher.collection._client.drop_index("bare", "vector")
        with pytest.raises(ArtifactError, match="has another index"):
            searcher.collection.describe()


_LOAD_AND_BE_KILLED = """
import os, signal, sys
from pathlib import Path
from indexing.__main__ import main
from indexing.searching import milvus_loading
from indexing.searching.milvus_collection import MilvusCollection

milvus_loading._ROWS_PER_BATCH = 50
upsert, num_batches = MilvusCollection.upsert, []

def upsert_thrice(collection, rows):
    upsert(collection, rows)
    num_batches.append(1)
    if len(num_batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

MilvusCollection.upsert = upsert_thrice
main(["load-milvus", *sys.argv[1:]])
"""


def test_a_load_killed_by_the_system_continues(tmp_path: Path) -> None:
    gallery = write_gallery(tmp_path)
    files = [["--vectors", "vectors.npy"], ["--ids", "ids.npy"], ["--metadata", "metadata.parquet"]]
    paths = [part for option, name in files for part in (option, str(tmp_path / name))]
    command = [sys.executable, "-c", _LOAD_AND_BE_KILLED, "--uri", gallery.uri, "--collection", "killed", *paths]
    killed = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    collection = MilvusCollection(gallery.uri, "killed")
    assert collection.count() == 150  # what was acknowledged is there
    collection.close()
    with load_into_milvus(gallery.source, gallery.uri, "killed", IndexType.parse("Flat")) as searcher:
        np.testing.assert_array_equal(searcher.ids(), np.sort(gallery.ids))
        np.testing.assert_array_equal(searcher.vectors_of(gallery.ids), gallery.vectors)
        assert searcher.metadata_of(gallery.ids) == gallery.rows


def test_a_server_that_went_away_is_named(tmp_path: Path) -> None:
    from milvus_lite.server_manager import server_manager_instance

    gallery = write_gallery(tmp_path)
    with load_into_milvus(gallery.source, gallery.uri, "gone", IndexType.parse("Flat")) as searcher:
        server_manager_instance.release_server(gallery.uri)
        with pytest.raises(ResourceError, match=f"collection gone at {gallery.uri}"):
            searcher.search(gallery.vectors[:1], SearchParameters())


def test_a_load_that_lost_or_changed_a_vector_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = write_gallery(tmp_path)
    upsert = MilvusCollection.upsert
    for name, spoil, message in (
        ("lost", lambda rows: rows[1:], "holds 259 vectors after the load, the gallery 260"),
        ("changed", lambda rows: [row | {"vector": row["vector"][::-1].copy()} for row in rows], "another vector"),
    ):
        monkeypatch.setattr(MilvusCollection, "upsert", lambda c, rows, spoil=spoil: upsert(c, spoil(rows)))
        with pytest.raises(DataError, match=message):
            load_into_milvus(gallery.source, gallery.uri, name, IndexType.parse("Flat"))


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


def test_an_address_where_nothing_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"http://somebody@127\.0\.0\.1:1|127\.0\.0\.1:1") as caught:
        MilvusSearcher.open("http://somebody:secret@127.0.0.1:1", "gallery")
    assert "secret" not in str(caught.value)
    for uri, name, message in (
        ("ftp://x", "gallery", "not an address"),
        (str(tmp_path / "no" / "a.db"), "gallery", "no folder"),
        (str(tmp_path / "a.db"), "drop table", "letters, digits"),
    ):
        with pytest.raises(SettingsError, match=message):
            MilvusSearcher.open(uri, name)


def test_a_collection_of_somebody_else_is_refused(tmp_path: Path) -> None:
    from milvus_lite.server_manager import server_manager_instance
    from pymilvus import MilvusClient

    uri = str(tmp_path / "a.db")
    client = MilvusClient(uri)
    client.create_collection("theirs", dimension=4)
    try:
        with pytest.raises(ArtifactError, match="not made by this program"):
            MilvusSearcher.open(uri, "theirs")
        with pytest.raises(ArtifactError, match="no collection missing"):
            MilvusSearcher.open(uri, "missing")
    finally:
        client.close()
        server_manager_instance.release_server(uri)


def test_what_milvus_does_not_have_is_refused_before_it_is_asked(gallery: Gallery) -> None:
    with pytest.raises(SettingsError, match="Milvus has no IVF16,SQfp16"):
        load_into_milvus(gallery.source, gallery.uri, "half", IndexType.parse("IVF16,SQfp16"))
    with pytest.raises(DataError, match="column tags holds list"):
        columns_of(pa.schema([("tags", pa.list_(pa.string()))]))


def test_columns_get_fields_that_milvus_can_name() -> None:
    names = ["id", "width", "Is Null", "NOT", "column_0", "_x", "ünï", "vector"]
    columns = columns_of(pa.schema([(name, pa.int32()) for name in names]))
    assert [column.name for column in columns] == names
    fields = [column.field for column in columns]
    assert fields == ["column_0_", "width", "column_2", "column_3", "column_0", "column_5", "column_6", "column_7"]
    known = {column.name: column for column in columns}
    assert expression_of(OneOf("NOT", (1,)), known) == "column_3 in [1]"


def test_the_command_loads_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = write_gallery(tmp_path)
    arguments = ["load-milvus", "--uri", gallery.uri, "--collection", "shop", "--json"]
    files = [["--vectors", "vectors.npy"], ["--ids", "ids.npy"], ["--metadata", "metadata.parquet"]]
    paths = [part for option, name in files for part in (option, str(tmp_path / name))]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *paths, "--type", "IVF4,Flat"])
    assert stop.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["vectors"] == NUM_VECTORS
    assert report["columns"] == list(gallery.rows[0])
    assert report["recall_curve"][-1]["recall"] == 1.0
    with MilvusSearcher.open(gallery.uri, "shop") as searcher:
        assert searcher.facts.properties == replace(searcher.facts.properties, is_loaded=True)
        np.testing.assert_array_equal(searcher.ids(), np.sort(gallery.ids))
