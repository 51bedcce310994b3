import json
import threading
from pathlib import Path

import numpy as np
import pytest

from indexing.build import build_index, measure_recall
from indexing.embedding_set import EmbeddingSet
from indexing.faiss_index import FaissSearcher, choose_type, create_faiss_index
from indexing.picture_search import search_with_pictures
from indexing.published_index import PublishedIndex, current_version, set_current_version, versions_of
from indexing.settings import IndexSettings
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError, ManifestMismatch, SettingsError
from lookalike.exact_search import exact_search
from lookalike.records import SearchParameters


def clustered(num_vectors: int, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(20, dim))[generator.integers(0, 20, num_vectors)]
    vectors = (vectors + 0.3 * generator.normal(size=vectors.shape)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, generator.permutation(10 * num_vectors)[:num_vectors].astype(np.int64) + 2**40


def searcher_over(index_type: str, num_vectors: int = 3000, num_probes: int = 1) -> FaissSearcher:
    vectors, ids = clustered(num_vectors)
    index = create_faiss_index(index_type, vectors, ids, seed=0)
    return FaissSearcher(index, index_type=index_type, default_num_probes=num_probes)


@pytest.mark.parametrize("index_type", ["Flat", "IVF16,Flat"])
def test_an_exact_search_equals_brute_force_under_64_bit_ids(index_type: str) -> None:
    vectors, ids = clustered(3000)
    queries, _ = clustered(20, seed=1)
    hits = searcher_over(index_type).search(queries, SearchParameters(k=12, exact=True))
    expected = exact_search(queries, vectors, ids, k=12)
    np.testing.assert_array_equal(hits.ids, expected.ids)
    np.testing.assert_allclose(hits.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("index_type", ["Flat", "IVF16,Flat"])
def test_ids_and_vectors_read_back(index_type: str) -> None:
    vectors, ids = clustered(3000)
    searcher = searcher_over(index_type)
    np.testing.assert_array_equal(searcher.ids(), np.sort(ids))
    np.testing.assert_allclose(searcher.vectors_of(ids[:5]), vectors[:5], atol=1e-6)
    with pytest.raises(KeyError):
        searcher.vectors_of(np.array([17]))


@pytest.mark.parametrize("index_type", ["Flat", "IVF16,Flat"])
def test_k_above_the_size_pads_with_minus_one(index_type: str) -> None:
    searcher = searcher_over(index_type, num_vectors=700)
    hits = searcher.search(clustered(2, seed=1)[0], SearchParameters(k=800, exact=True))
    assert (hits.ids[:, :700] >= 0).all()
    assert (hits.ids[:, 700:] == -1).all()
    assert np.isneginf(hits.scores[:, 700:]).all()


def test_duplicates_are_ordered_by_id() -> None:
    vectors = np.repeat(clustered(3)[0], 4, axis=0)
    ids = np.array([9, 2, 7, 4, 50, 51, 52, 53, 60, 61, 62, 63])
    searcher = FaissSearcher(create_faiss_index("Flat", vectors, ids, seed=0), index_type="Flat", default_num_probes=1)
    hits = searcher.search(vectors[:1], SearchParameters(k=4))
    np.testing.assert_array_equal(hits.ids[0], [2, 4, 7, 9])


@pytest.mark.parametrize(
    ("query", "message"), [(np.zeros((1, 3), np.float32), "length 16"), (np.full((1, 16), np.nan, np.float32), "NaN")]
)
def test_unusable_queries_are_refused(query: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        searcher_over("Flat", num_vectors=50).search(query, SearchParameters())


def test_more_probes_find_more_and_concurrent_queries_keep_their_own_parameters() -> None:
    vectors, ids = clustered(3000)
    queries, _ = clustered(50, seed=2)
    searcher = searcher_over("IVF32,Flat")
    parameters = [SearchParameters(k=10, num_probes=1), SearchParameters(k=10, exact=True)]
    expected = [searcher.search(queries, p).ids for p in parameters]
    truth = exact_search(queries, vectors, ids, k=10).ids
    np.testing.assert_array_equal(expected[1], truth)
    assert (expected[0] != truth).any()
    wrong: list[int] = []

    def hammer(which: int) -> None:
        for _ in range(30):
            if not np.array_equal(searcher.search(queries, parameters[which]).ids, expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=hammer, args=(number % 2,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_type_follows_the_size_and_wishes_are_checked() -> None:
    assert choose_type(50_000, IndexSettings()) == "Flat"
    assert choose_type(1_000_000, IndexSettings()) == "IVF2048,Flat"
    assert choose_type(10, IndexSettings(type="IVF8,Flat")) == "IVF8,Flat"
    with pytest.raises(SettingsError, match="IVF8,PQ4"):
        choose_type(10, IndexSettings(type="IVF8,PQ4"))
    with pytest.raises(SettingsError, match="at least 624"):
        create_faiss_index("IVF16,Flat", *clustered(600), seed=0)


def test_the_measured_curve_rises_to_exact() -> None:
    vectors, ids = clustered(3000)
    curve = measure_recall(searcher_over("IVF32,Flat"), vectors, ids, index_type="IVF32,Flat", settings=IndexSettings())
    recalls = [point["recall_at_10"] for point in curve]
    assert [point["num_probes"] for point in curve] == [1, 2, 4, 8, 16, 32]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == 1.0


def test_a_built_index_opens_searches_and_carries_its_encoder(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    index = build_index(embeddings, tmp_path / "index")
    assert (index.version, index.num_vectors, index.dim) == ("v0001", 60, 16)
    np.testing.assert_array_equal(index.ids, np.sort(embeddings.ids))
    hits = index.search(embeddings.vectors()[:3], SearchParameters(k=1))
    np.testing.assert_array_equal(hits.ids[:, 0], embeddings.ids[:3])
    assert index.metadata_of(embeddings.ids[:1])[0]["class_name"].startswith("class")
    with pytest.raises(KeyError):
        index.metadata_of(np.array([60]))
    assert index.load_encoder().fingerprint == embeddings.manifest.details["encoder_fingerprint"]
    assert index.manifest.details["recall_curve"][0]["recall_at_10"] == 1.0


def test_the_same_build_is_reused_and_another_becomes_a_new_version(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    first = build_index(embeddings, folder)
    assert build_index(embeddings, folder).version == first.version
    second = build_index(embeddings, folder, IndexSettings(seed=1))
    assert (second.version, versions_of(folder)) == ("v0002", ["v0001", "v0002"])
    set_current_version(folder, "v0001")
    assert current_version(folder) == PublishedIndex.open(folder).version == "v0001"
    assert PublishedIndex.open(folder, version="v0002").version == "v0002"


def test_damage_and_foreign_parts_are_found(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = build_index(embeddings, folder)
    index.check()
    metadata = folder / "v0001" / "metadata.arrow"
    data = bytearray(metadata.read_bytes())
    data[len(data) // 2] ^= 1
    metadata.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="metadata"):
        PublishedIndex.open(folder).check()
    with pytest.raises(ArtifactError, match="not an index"):
        PublishedIndex.open(tmp_path)
    manifest = folder / "v0001" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["details"]["encoder_fingerprint"] = "0" * 64
    manifest.write_text(json.dumps(tree))
    with pytest.raises(ChecksumMismatch, match="changed"):
        PublishedIndex.open(folder)


def test_an_encoder_of_another_index_is_refused(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    from lookalike.encoder import create_encoder, save_encoder
    from lookalike.encoder_settings import EncoderSettings, InputSettings

    build_index(embeddings, tmp_path / "index")
    other = create_encoder(EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32)))
    save_encoder(other, tmp_path / "index" / "v0001" / "encoder", replace=True)
    with pytest.raises(ManifestMismatch, match="was built with encoder"):
        PublishedIndex.open(tmp_path / "index").load_encoder()


def test_vectors_that_are_not_finite_are_named(embeddings: EmbeddingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    load = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: np.full_like(load(*a, **k), np.nan))
    with pytest.raises(DataError, match=f"picture {embeddings.ids[0]} holds NaN"):
        embeddings.vectors()


def test_a_picture_of_the_collection_finds_itself(
    embeddings: EmbeddingSet, picture_folder: Path, tmp_path: Path
) -> None:
    index = build_index(embeddings, tmp_path / "index")
    picture = picture_folder / "test" / "class07" / "2.png"
    [answer] = search_with_pictures(index, [picture], SearchParameters(k=3))
    assert answer["hits"][0]["key"] == "test/class07/2"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(answer["hits"]) == 3
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    with pytest.raises(DataError, match=r"broken\.png"):
        search_with_pictures(index, [tmp_path / "broken.png"], SearchParameters())
    with pytest.raises(DataError, match=r"absent\.png"):
        search_with_pictures(index, [tmp_path / "absent.png"], SearchParameters())


def test_an_index_is_never_built_into_something_else(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="other than an index"):
        build_index(embeddings, tmp_path / "letters")
    with pytest.raises(ArtifactError, match="other than an index"):
        build_index(embeddings, embeddings.folder)


@pytest.mark.parametrize("name", ["index.faiss", "metadata.arrow"])
def test_a_file_broken_beyond_reading_is_named(embeddings: EmbeddingSet, tmp_path: Path, name: str) -> None:
    build_index(embeddings, tmp_path / "index")
    file = tmp_path / "index" / "v0001" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError, match=name):
        PublishedIndex.open(tmp_path / "index")
    assert build_index(embeddings, tmp_path / "index").version == "v0002"


def test_an_index_of_an_older_transform_is_refused(
    embeddings: EmbeddingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(embeddings, tmp_path / "index")
    monkeypatch.setattr("lookalike.encoder_settings.TRANSFORM_VERSION", 99)
    with pytest.raises(ManifestMismatch, match="evaluation transform"):
        index.load_encoder()


def test_an_index_that_answers_with_wrong_ids_is_not_published(
    embeddings: EmbeddingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_shifted_ids(index_type: str, vectors: np.ndarray, ids: np.ndarray, *, seed: int) -> object:
        return create_faiss_index(index_type, vectors, np.roll(ids, 1), seed=seed)

    monkeypatch.setattr("indexing.build.create_faiss_index", with_shifted_ids)
    with pytest.raises(DataError, match="not published"):
        build_index(embeddings, tmp_path / "index")
    assert not (tmp_path / "index" / "CURRENT").exists()
