import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from scipy.io import savemat

from data_pipelines.shard_set import ShardSet
from evaluation.vector_files import load_ids, load_labels, load_vector_parts, load_vectors, provenance
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.embedding_set import (
    EMBEDDING_SET_KIND,
    EMBEDDING_SET_VERSION,
    EmbeddingSet,
    gather_ledger,
    write_block,
)
from indexing.settings import EmbedSettings
from indexing.sources.embeddings import EmbeddingSource
from lookalike.artifacts import Manifest, file_sha256, write_manifest
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import ArtifactError, DataError

QUERIES = np.random.default_rng(0).normal(size=(3, 4))
DATABASE = np.random.default_rng(1).normal(size=(7, 4))


@pytest.fixture(scope="module")
def embeddings(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSet:
    torch.manual_seed(0)
    settings = EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32))
    folder = tmp_path_factory.mktemp("embeddings") / "set"
    with ShardSet.open(shards_folder) as shard_set:
        return embed_shards(create_encoder(settings), shard_set, folder, settings=EmbedSettings(storage="float16"))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_npy_is_mapped_and_not_read(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "v.npy"
    np.save(file, np.ones((100_000, 16), dtype))
    tracemalloc.start()
    vectors = load_vectors(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert (vectors.shape, vectors.dtype) == ((100_000, 16), np.dtype(dtype))
    assert provenance(file, [vectors]) == {
        "file": "v.npy",
        "dtype": str(np.dtype(dtype)),
        "shape": [100_000, 16],
        "sha256": file_sha256(file),
    }


def test_large_files_are_not_hashed(tmp_path: Path) -> None:
    vectors = np.lib.format.open_memmap(tmp_path / "v.npy", mode="w+", dtype=np.float32, shape=(1 << 15, 1 << 11))
    assert provenance(tmp_path / "v.npy", [vectors]) == {"file": "v.npy", "dtype": "float32", "shape": [32768, 2048]}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_mat_holds_queries_and_database_in_columns(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "features.mat"
    savemat(file, {"Q": QUERIES.T.astype(dtype), "X": DATABASE.T.astype(dtype), "note": "extracted"})
    np.testing.assert_array_equal(load_vectors(file, role="queries"), QUERIES.astype(dtype))
    np.testing.assert_array_equal(load_vectors(file, role="database"), DATABASE.astype(dtype))
    np.testing.assert_array_equal(load_vectors(file), DATABASE.astype(dtype))
    np.testing.assert_array_equal(load_vectors(file, role="queries", name="X"), DATABASE.astype(dtype))
    savemat(file, {"Q": QUERIES[:1].T})
    np.testing.assert_array_equal(load_vectors(file, role="queries"), QUERIES[:1])
    savemat(file, {"features": DATABASE.T, "num": 7.0})
    np.testing.assert_array_equal(load_vectors(file, role="queries"), DATABASE)


def test_an_embedding_set_stays_on_disk_in_the_order_of_its_ids(embeddings: EmbeddingSet) -> None:
    parts = load_vector_parts(embeddings.folder)
    assert len(parts) > 2
    assert all(isinstance(part, np.memmap) and part.dtype == np.float16 for part in parts)
    vectors = load_vectors(embeddings.folder)
    order = np.argsort(embeddings.ids)
    np.testing.assert_array_equal(vectors.astype(np.float32), embeddings.vectors()[order])
    np.testing.assert_array_equal(np.concatenate(parts), vectors)
    np.testing.assert_array_equal(load_ids(embeddings.folder), embeddings.ids[order])
    assert provenance(embeddings.folder, parts) == {
        "file": "set",
        "dtype": "float16",
        "shape": [60, 16],
        "fingerprint": embeddings.fingerprint,
    }


def embedding_set(folder: Path, blocks: dict[str, list[int]]) -> Path:
    """Each vector holds its id."""
    folder.mkdir()
    for name, ids in blocks.items():
        vectors = np.repeat(np.array(ids, np.float32)[:, None], 4, axis=1).reshape(-1, 4)
        write_block(folder, name, vectors, np.array(ids, np.int64), [str(i) for i in ids], [])
    gather_ledger(folder, list(blocks))
    details = {"dim": 4, "blocks": list(blocks)}
    write_manifest(folder, Manifest(EMBEDDING_SET_KIND, EMBEDDING_SET_VERSION, details=details))
    return folder


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"a": [4, 6], "b": [], "c": [0, 5]}, [0, 4, 5, 6]),
        ({"a": [], "b": [2, 3]}, [2, 3]),
        ({"a": []}, []),
        ({}, []),
    ],
)
def test_blocks_of_any_order_and_size_are_read_by_id(
    blocks: dict[str, list[int]], expected: list[int], tmp_path: Path
) -> None:
    folder = embedding_set(tmp_path / "set", blocks)
    vectors = load_vectors(folder)
    assert vectors.shape == (len(expected), 4)
    assert vectors[:, 0].tolist() == load_ids(folder).tolist() == expected
    assert provenance(folder, load_vector_parts(folder))["shape"] == [len(expected), 4]


def test_a_block_without_its_ids_is_named(tmp_path: Path) -> None:
    folder = embedding_set(tmp_path / "set", {"a": [0, 1], "b": [2]})
    np.save(folder / "blocks" / "b.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match="4 vectors and 3 ids"):
        load_vectors(folder)


def test_an_index_gives_its_stored_vectors_by_id(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    index = build_index(EmbeddingSource(embeddings), tmp_path / "index")
    [vectors] = load_vector_parts(tmp_path / "index")
    np.testing.assert_array_equal(vectors, embeddings.vectors()[np.argsort(embeddings.ids)])
    np.testing.assert_array_equal(load_ids(tmp_path / "index"), np.sort(embeddings.ids))
    record = provenance(tmp_path / "index", [vectors])
    assert record["shape"] == [60, 16]
    assert (record["version"], record["fingerprint"]) == ("v0001", index.fingerprint)


def saved(file: Path, array: ndarray) -> Path:
    np.save(file, array)
    return file


def test_what_holds_no_vectors_is_named_with_what_was_found(tmp_path: Path) -> None:
    for array, found in (
        (np.zeros(3), r"float64 of shape \(3,\)"),
        (np.zeros((3, 2), np.int32), r"int32 of shape \(3, 2\)"),
        (np.array(["a"]), "<U1"),
    ):
        with pytest.raises(DataError, match=rf"v\.npy: expected rows of floats, found {found}"):
            load_vectors(saved(tmp_path / "v.npy", array))
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY")
    for file in ("v.npy", "absent.npy"):
        with pytest.raises(DataError, match=rf"{file} cannot be read as \.npy"):
            load_vectors(tmp_path / file)
    np.savez(tmp_path / "v.npz", a=np.zeros(2))
    with pytest.raises(DataError, match="several arrays"):
        load_vectors(tmp_path / "v.npz")
    with pytest.raises(DataError, match=r"v\.npy has no variables"):
        load_vectors(tmp_path / "v.npy", name="X")
    savemat(tmp_path / "v.mat", {"A": QUERIES, "B": DATABASE})
    with pytest.raises(DataError, match=r"expected the variable Q .* found A float64 \[3, 4\], B float64 \[7, 4\]"):
        load_vectors(tmp_path / "v.mat", role="queries")
    savemat(tmp_path / "v.mat", {"X": np.arange(6).reshape(2, 3)})
    with pytest.raises(DataError, match=r"v\.mat: expected rows of floats, found int64"):
        load_vectors(tmp_path / "v.mat")
    (tmp_path / "v.mat").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"v\.mat cannot be read as a MATLAB file"):
        load_vectors(tmp_path / "v.mat")
    (tmp_path / "folder").mkdir()
    for load in (load_vectors, load_ids):
        with pytest.raises(ArtifactError, match="is not a finished embedding set"):
            load(tmp_path / "folder")


def test_labels_are_whole_numbers_and_ids_unique_ones(tmp_path: Path) -> None:
    labels = load_labels(saved(tmp_path / "l.npy", np.array([3, 3, -1], np.int32)))
    assert labels.tolist() == [3, 3, -1]
    assert load_ids(saved(tmp_path / "i.npy", np.array([7, 3], np.uint8))).tolist() == [7, 3]
    for array in (np.zeros(3), np.zeros((3, 1), np.int64)):
        with pytest.raises(DataError, match=r"l\.npy: expected one whole number per row, found"):
            load_labels(saved(tmp_path / "l.npy", array))
    with pytest.raises(DataError, match=r"i\.npy holds the id 7 more than once"):
        load_ids(saved(tmp_path / "i.npy", np.array([7, 3, 7])))
    with pytest.raises(DataError, match=r"i\.npy holds the id -2"):
        load_ids(saved(tmp_path / "i.npy", np.array([7, -2])))
