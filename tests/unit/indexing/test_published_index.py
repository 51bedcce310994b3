"""A published index: what it answers, and what it notices."""

import gc
import json
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexing.building.build import build_index
from indexing.embedding_set import EmbeddingSet
from indexing.index_check import check_index
from indexing.living.live_view import LiveView
from indexing.picture_search import search_with_pictures
from indexing.planning import calibration, planner
from indexing.published_index import PublishedIndex
from indexing.settings import IndexSettings
from indexing.sources.embeddings import EmbeddingSource
from indexing.versions import current_version, set_current_version, versions_of
from lookalike.artifacts import MANIFEST_NAME, Manifest, fingerprint, read_manifest, write_manifest
from lookalike.encoder import create_encoder, save_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError, ManifestMismatch
from lookalike.exact_search import exact_search
from lookalike.filters import AllOf, Between, OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import Effort, SearchParameters
from tests.unit.indexing.clustered_vectors import clustered, write_source

SETTINGS = IndexSettings(type="IVF8,SQ8", recall=0.5, num_measured_queries=10)


@pytest.fixture(scope="module", autouse=True)
def known_rates() -> Any:
    """What this machine's speed is takes seconds to find out, and has no bearing on what is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "measure_rates", calibration.nominal_rates)
        yield


@pytest.fixture(scope="module")
def vector_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of vectors alone."""
    folder = tmp_path_factory.mktemp("vectors")
    build_index(write_source(folder, 1500), folder / "index", SETTINGS)
    return folder / "index"


@pytest.fixture(scope="module")
def picture_index(embeddings: EmbeddingSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an embedding set, with encoder and pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "index"
    build_index(EmbeddingSource(embeddings), folder)
    return folder


def test_a_filter_beside_deletions_is_worked_out_once(vector_index: Path) -> None:
    """A live index passes the same ids with every search until the next change."""
    index = PublishedIndex.open(vector_index)
    condition, kept = Between("price", at_least=3), IdSelection.all_but(index.ids()[:5])
    first = index.selection_of(condition, among=kept)
    assert index.selection_of(Between("price", at_least=3), among=kept) is first
    others = IdSelection.all_but(index.ids()[5:9])
    assert not np.isin(index.ids()[5:9], index.selection_of(condition, among=others).ids).any()
    index.selection_of(OneOf("price", (1,)))  # which equals the next one, for Python
    with pytest.raises(ValueError, match="cannot be compared with True"):
        index.selection_of(OneOf("price", (True,)))


def test_an_index_that_nobody_holds_is_gone_at_once(vector_index: Path) -> None:
    """Not at the next collection of garbage: after a swap, a graph of gigabytes would stay beside the new one."""
    gc.collect()
    gc.disable()
    try:
        index = PublishedIndex.open(vector_index)
        query = index.vectors_of(index.ids()[:1])
        index.search(query, SearchParameters(effort=Effort(num_probes=2), filter=Between("price", at_least=0)))
        watched = weakref.ref(index), weakref.ref(index.store.vectors)
        del index
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


@pytest.fixture
def copied(vector_index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vector_index, tmp_path / "copied"))


def test_an_index_of_pictures_opens_searches_and_carries_its_encoder(
    embeddings: EmbeddingSet, picture_index: Path
) -> None:
    index = PublishedIndex.open(picture_index)
    assert (index.version, index.num_vectors, index.dim, index.type.name) == ("v0001", 60, 16, "Flat")
    np.testing.assert_array_equal(index.ids(), np.sort(embeddings.ids))
    hits = index.search(index.vectors_of(embeddings.ids[:3]), SearchParameters(k=1))
    np.testing.assert_array_equal(hits.ids[:, 0], embeddings.ids[:3])
    assert index.metadata_of(embeddings.ids[:1])[0]["class_name"].startswith("class")
    with pytest.raises(KeyError):
        index.metadata_of(np.array([60]))
    assert index.load_encoder().fingerprint == embeddings.manifest.details["encoder_fingerprint"]
    assert index.manifest.details["recall_curve"] == []
    assert index.manifest.details["norms"] == pytest.approx({"least": 1, "mean": 1, "largest": 1}, abs=1e-4)
    assert index.manifest.measurements["seconds"]["store"] > 0


def test_a_filter_finds_what_brute_force_over_the_fitting_rows_finds(vector_index: Path) -> None:
    index = PublishedIndex.open(vector_index)
    vectors, ids = clustered(1500)
    condition = AllOf((OneOf("class_name", ("class 1", None)), Between("price", at_least=5.0)))
    rows = index.metadata_of(ids)
    fits = np.array([row["class_name"] in ("class 1", None) and row["price"] >= 5 for row in rows])
    assert 20 < fits.sum() < 500
    queries, _ = clustered(10, seed=3)
    expected = exact_search(queries, vectors[fits], ids[fits], k=8).ids
    parameters = SearchParameters(k=8, exact=True, filter=condition)
    np.testing.assert_array_equal(index.search(queries, parameters).ids, expected)
    half = IdSelection.only(ids[::2])
    both = index.search(queries, SearchParameters(k=8, exact=True, filter=condition, among=half))
    fits[1::2] = False
    np.testing.assert_array_equal(both.ids, exact_search(queries, vectors[fits], ids[fits], k=8).ids)
    with pytest.raises(ValueError, match="colour"):
        index.search(queries, SearchParameters(filter=OneOf("colour", ("red",))))


def test_a_check_of_a_sound_index_says_what_it_looked_at(vector_index: Path, picture_index: Path) -> None:
    assert len(list(check_index(vector_index, "v0001"))) == 2
    lines = list(check_index(picture_index, "v0001"))
    assert len(lines) == 4
    assert "8 canary pictures" in lines[-1]


@pytest.mark.parametrize(
    "name", ["vectors.npy", "ids.npy", "metadata.arrow", "index.faiss", "lists.ivfdata", "manifest.json"]
)
def test_one_flipped_bit_is_found_in_any_file(copied: Path, name: str) -> None:
    file = copied / "v0001" / name
    data = bytearray(file.read_bytes())
    place = random.randrange(len(data)) if name != "manifest.json" else data.index(b'"dim"') + 8
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=name if name != "manifest.json" else "manifest"):
        list(check_index(copied, "v0001"))


def test_swapped_metadata_is_found_even_under_a_manifest_that_knows_it(copied: Path, tmp_path: Path) -> None:
    other = build_index(write_source(tmp_path / "other", 1500, seed=9), tmp_path / "index", SETTINGS)
    metadata = copied / "v0001" / "metadata.arrow"
    metadata.write_bytes((other.folder / "metadata.arrow").read_bytes())
    with pytest.raises(ChecksumMismatch, match="metadata"):
        list(check_index(copied, "v0001"))


def test_ids_that_belong_to_other_vectors_are_found_by_the_canaries(copied: Path) -> None:
    version = copied / "v0001"
    ids = np.load(version / "ids.npy")
    vectors = np.load(version / "vectors.npy")
    np.save(version / "vectors.npy", np.roll(vectors, 1, axis=0))
    manifest = read_manifest(version, kind="index", newest_version=2)
    (version / MANIFEST_NAME).unlink()
    write_manifest(version, manifest)  # bytes are as the manifest says: only a search can tell
    index = PublishedIndex.open(copied)
    assert len(ids) == index.num_vectors
    with pytest.raises(ArtifactError, match="search does not find the vector of id"):
        list(check_index(copied, "v0001"))


def test_an_encoder_of_another_index_is_refused(picture_index: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(picture_index, tmp_path / "index"))
    other = create_encoder(EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32)))
    shutil.rmtree(folder / "v0001" / "encoder")
    save_encoder(other, folder / "v0001" / "encoder")
    index = PublishedIndex.open(folder)
    with pytest.raises(ManifestMismatch, match="was built with encoder"):
        index.load_encoder()
    with pytest.raises(ManifestMismatch, match="was built with encoder"):
        list(check_index(folder, "v0001"))


def test_pictures_that_give_other_vectors_are_found(picture_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "indexing.index_check.EvaluationTransform.__call__", lambda self, image: np.zeros((3, 32, 32), np.uint8)
    )
    with pytest.raises(ManifestMismatch, match="embedded again, has cosine"):
        list(check_index(picture_index, "v0001"))


def test_an_index_of_an_older_transform_is_refused(picture_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PublishedIndex.open(picture_index)
    monkeypatch.setattr("lookalike.encoder_settings.TRANSFORM_VERSION", 99)
    with pytest.raises(ManifestMismatch, match="evaluation transform"):
        index.load_encoder()


def test_an_index_of_vectors_alone_says_so(vector_index: Path) -> None:
    index = PublishedIndex.open(vector_index)
    with pytest.raises(ArtifactError, match="vectors alone"):
        index.load_encoder()
    with pytest.raises(ArtifactError, match="vectors alone"):
        _ = index.shards_folder


@pytest.mark.parametrize("name", ["index.faiss", "lists.ivfdata", "metadata.arrow", "vectors.npy", "ids.npy"])
def test_a_file_broken_beyond_reading_is_named_and_the_index_built_anew(
    copied: Path, tmp_path: Path, name: str
) -> None:
    file = copied / "v0001" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError, match=name if "npy" not in name else "cannot be read"):
        PublishedIndex.open(copied)
    file.unlink()
    with pytest.raises(ArtifactError, match=name if "npy" not in name else "cannot be read"):
        PublishedIndex.open(copied)
    assert build_index(write_source(tmp_path / "source", 1500), copied, SETTINGS).version == "v0002"


def test_an_older_format_is_refused_with_advice(copied: Path) -> None:
    path = copied / "v0001" / MANIFEST_NAME
    tree = {**json.loads(path.read_text()), "format_version": 1}
    covered = ("kind", "format_version", "parents", "details")
    files = {name: entry["sha256"] for name, entry in tree["files"].items()}
    tree["fingerprint"] = fingerprint({**{name: tree[name] for name in covered}, "files": files})
    path.write_text(json.dumps(tree))
    with pytest.raises(ArtifactError, match="format 1, this version reads 2"):
        PublishedIndex.open(copied)


def test_versions_are_opened_by_name(copied: Path) -> None:
    shutil.copytree(copied / "v0001", copied / "v0002")
    set_current_version(copied, "v0002")
    assert versions_of(copied) == ["v0001", "v0002"]
    assert current_version(copied) == PublishedIndex.open(copied).version == "v0002"
    assert PublishedIndex.open(copied, version="v0001").version == "v0001"
    with pytest.raises(ArtifactError, match="not an index"):
        PublishedIndex.open(copied / "v0001")


def test_measurements_are_outside_the_fingerprint(tmp_path: Path) -> None:
    plain, timed = (
        Manifest("index", 2, details={"dim": 3}),
        Manifest("index", 2, details={"dim": 3}, measurements={"ms": 4}),
    )
    assert plain.fingerprint == timed.fingerprint
    written = write_manifest(tmp_path, timed)
    assert read_manifest(tmp_path, kind="index", newest_version=2) == written
    tree = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del tree["measurements"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(tree))
    assert read_manifest(tmp_path, kind="index", newest_version=2).measurements == {}, "older manifests lack them"


def test_a_picture_of_the_collection_finds_itself(picture_index: Path, picture_folder: Path, tmp_path: Path) -> None:
    index = PublishedIndex.open(picture_index)
    picture = picture_folder / "test" / "class07" / "2.png"
    [answer] = search_with_pictures(LiveView.of(index), [picture], SearchParameters(k=3))
    assert answer["hits"][0]["key"] == "test/class07/2"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(answer["hits"]) == 3
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    with pytest.raises(DataError, match=r"broken\.png"):
        search_with_pictures(LiveView.of(index), [tmp_path / "broken.png"], SearchParameters())
    with pytest.raises(DataError, match=r"absent\.png"):
        search_with_pictures(LiveView.of(index), [tmp_path / "absent.png"], SearchParameters())
