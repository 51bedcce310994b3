"""Loading a Milvus collection, interrupted or whole; the engine is milvus-lite."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("pymilvus", reason="needs the extra [milvus-lite]")
pytest.importorskip("milvus_lite", reason="needs the extra [milvus-lite]")

from indexing.__main__ import main
from indexing.index_types import IndexType
from indexing.searching.milvus import MilvusSearcher
from indexing.searching.milvus_collection import MilvusCollection
from indexing.searching.milvus_expressions import expression_of
from indexing.searching.milvus_layout import columns_of
from indexing.searching.milvus_loading import load_into_milvus
from lookalike.errors import ArtifactError, DataError, ManifestMismatch, ResourceError, SettingsError
from lookalike.filters import OneOf
from lookalike.records import SearchParameters
from tests.unit.indexing.milvus_gallery import NUM_VECTORS, write_gallery

pytestmark = pytest.mark.usefixtures("few_measured_queries")


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
