from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.shard_set import ShardSet
from indexing.embedding_set import EmbeddingSet
from indexing.sources import finite_blocks as finite_blocks_module
from indexing.sources import open_source
from indexing.sources.arrays import ArraySource
from indexing.vector_source import VectorSource
from lookalike.artifacts import write_manifest
from lookalike.errors import ChecksumMismatch, DamagedArtifact, DataError, ManifestMismatch

NUM_VECTORS, DIM = 50, 6


def unit_vectors(num_vectors: int = NUM_VECTORS, dtype: type = np.float32) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(num_vectors, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def save_table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lists(vectors: np.ndarray, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(list(vectors), kind or pa.list_(pa.float32(), DIM))


def read_all(source: VectorSource) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(source.blocks())
    return np.concatenate([block.vectors for block in blocks]), np.concatenate([block.ids for block in blocks])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_blocks_module, "_LARGEST_BLOCK_BYTES", 7 * 4 * DIM)


def test_an_embedding_set_is_read_block_by_block_with_the_sample_table(embeddings: EmbeddingSet) -> None:
    source = open_source(embeddings.folder)
    vectors, ids = read_all(source)
    np.testing.assert_array_equal(vectors, embeddings.vectors())
    np.testing.assert_array_equal(ids, source.ids())
    assert (source.num_vectors, source.dim) == vectors.shape
    with ShardSet.open(embeddings.shards_folder) as shard_set:
        some = ids[[5, 0, 7]]
        expected = shard_set.samples.select(["key", "class_name", "label", "split", "width", "height"]).take(some)
        assert source.metadata_of(some).equals(expected)
        assert source.parents == {
            "embeddings": embeddings.fingerprint,
            "encoder": embeddings.manifest.parents["encoder"],
            "shards": shard_set.fingerprint,
        }
    assert source.fingerprint == embeddings.fingerprint
    assert source.encoder_folder == embeddings.folder / "encoder"
    assert set(source.details) == {"encoder_fingerprint", "transform_fingerprint"}
    source.check()


def test_damage_to_an_embedding_set_and_other_shards_are_found(embeddings: EmbeddingSet, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "e"
    shutil.copytree(embeddings.folder, copy)
    block = next(iter(sorted((copy / "blocks").glob("*.npy"))))
    whole = block.read_bytes()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ChecksumMismatch, match=block.name):
        open_source(copy).check()
    block.write_bytes(whole[:-5])
    with pytest.raises(DamagedArtifact, match="Embed again"):
        list(open_source(copy).blocks())
    vectors = np.load(embeddings.folder / "blocks" / block.name).copy()
    vectors[1, 0] = np.nan
    np.save(block, vectors)
    with pytest.raises(DataError, match=rf"{block.name}: the vector in row 1 .*NaN"):
        list(open_source(copy).blocks())
    np.save(block, vectors[1:])
    with pytest.raises(DamagedArtifact, match="shape"):
        list(open_source(copy).blocks())
    block.write_bytes(whole)
    manifest = open_source(copy).embeddings.manifest  # type: ignore[attr-defined]
    changed = {name: getattr(manifest, name) for name in ("kind", "format_version", "details", "settings", "locations")}
    write_manifest(copy, type(manifest)(**changed, parents={**manifest.parents, "shards": "0" * 64}))
    with pytest.raises(ManifestMismatch, match="shards"):
        open_source(copy).check()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.dtype(">f4")])
@pytest.mark.usefixtures("small_blocks")
def test_rows_of_an_npy_get_their_row_numbers_as_ids(tmp_path: Path, dtype: type) -> None:
    source = ArraySource(save(tmp_path / "v.npy", unit_vectors(dtype=dtype)))
    blocks = list(source.blocks())
    assert max(len(block.ids) for block in blocks) == 7
    vectors, ids = read_all(source)
    assert vectors.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(vectors, unit_vectors(dtype=dtype).astype(np.float32))
    np.testing.assert_array_equal(ids, np.arange(NUM_VECTORS))
    assert source.metadata_of(np.array([3, 1])).to_pylist() == [{"key": "3"}, {"key": "1"}]
    assert (source.num_vectors, source.dim) == (NUM_VECTORS, DIM)
    assert source.encoder_folder is source.shards_folder is None
    assert source.parents.keys() == {"vectors"}


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_ids_and_metadata_belong_to_the_rows(tmp_path: Path, suffix: str) -> None:
    ids = np.random.default_rng(1).permutation(1000)[:NUM_VECTORS] + 2**40
    path = tmp_path / f"i.{suffix}"
    ids_file = save(path, ids) if suffix == "npy" else save_table(path, id=ids)
    metadata = save_table(tmp_path / "m.parquet", colour=[f"c{i}" for i in ids], key=list(range(NUM_VECTORS)))
    source = ArraySource(save(tmp_path / "v.npy", unit_vectors()), ids_file, metadata)
    np.testing.assert_array_equal(read_all(source)[1], ids)
    assert source.metadata_of(ids[[9, 2]]).to_pylist() == [
        {"colour": f"c{ids[9]}", "key": "9"},
        {"colour": f"c{ids[2]}", "key": "2"},
    ]
    with pytest.raises(KeyError):
        source.metadata_of(np.array([5]))
    keyless = ArraySource(tmp_path / "v.npy", ids_file, save_table(tmp_path / "n.parquet", size=range(NUM_VECTORS)))
    assert keyless.metadata_of(ids[4:5]).to_pylist() == [{"key": str(ids[4]), "size": 4}]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), DIM), pa.list_(pa.float64()), pa.large_list(pa.float32())])
@pytest.mark.usefixtures("small_blocks")
def test_one_parquet_file_may_hold_all(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "all.parquet"
    ids = np.arange(NUM_VECTORS)[::-1] * 3
    table = pa.table({"id": ids, "path": [f"p{i}" for i in ids], "embedding": lists(unit_vectors(), kind)})
    pq.write_table(table, path, row_group_size=20)
    source = ArraySource(path)
    vectors, found_ids = read_all(source)
    np.testing.assert_array_equal(vectors, unit_vectors())
    np.testing.assert_array_equal(found_ids, ids)
    assert source.metadata_of(ids[7:8]).to_pylist() == [{"key": str(ids[7]), "path": f"p{ids[7]}"}]


def test_ids_beside_vectors_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's vectors may be larger than memory."""
    path = save_table(tmp_path / "all.parquet", id=np.arange(NUM_VECTORS), embedding=lists(unit_vectors()))
    columns_read: list[list[str] | None] = []

    def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
        columns_read.append(columns)
        return original(path, columns=columns)

    original = pq.read_table
    monkeypatch.setattr(pq, "read_table", read_table)
    ArraySource(path)
    assert columns_read == [["id"]]


def test_the_fingerprint_is_of_everything_read(tmp_path: Path) -> None:
    vectors, ids = save(tmp_path / "v.npy", unit_vectors()), save(tmp_path / "i.npy", np.arange(NUM_VECTORS))
    sources = [ArraySource(vectors), ArraySource(vectors, ids), ArraySource(vectors, normalize=True)]
    prints = {source.fingerprint for source in sources}
    assert len(prints) == 3
    assert ArraySource(vectors, ids).fingerprint in prints
    save(ids, np.arange(NUM_VECTORS)[::-1])
    assert ArraySource(vectors, ids).fingerprint not in prints


def test_a_file_that_changes_meanwhile_is_found(tmp_path: Path) -> None:
    source = ArraySource(save(tmp_path / "v.npy", unit_vectors()))
    source.check()
    blocks = source.blocks()
    next(blocks)
    save(tmp_path / "v.npy", unit_vectors(NUM_VECTORS + 1))
    with pytest.raises(DamagedArtifact, match="changed"):
        source.check()
    with pytest.raises(DamagedArtifact, match="changed"):
        list(blocks)


def test_lengths_other_than_one_are_scaled_only_when_asked(tmp_path: Path) -> None:
    scaled = unit_vectors() * np.linspace(0.5, 3, NUM_VECTORS, dtype=np.float32)[:, None]
    path = save(tmp_path / "v.npy", scaled)
    with pytest.raises(DataError, match=r"lengths from 0\.5 to 3, e\.g\. of id 49.*--normalize"):
        list(ArraySource(path).blocks())
    np.testing.assert_allclose(read_all(ArraySource(path, normalize=True))[0], unit_vectors(), atol=1e-6)
    scaled[3] = 0
    with pytest.raises(DataError, match="id 3 is zero"):
        list(ArraySource(save(tmp_path / "z.npy", scaled), normalize=True).blocks())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_vector_that_is_not_finite_is_named(tmp_path: Path, suffix: str) -> None:
    vectors = unit_vectors()
    vectors[31, 2] = np.inf
    path = tmp_path / f"v.{suffix}"
    path = save(path, vectors) if suffix == "npy" else save_table(path, v=lists(vectors))
    with pytest.raises(DataError, match=r"row 31 \(id 131\) holds NaN"):
        list(ArraySource(path, save(tmp_path / "i.npy", np.arange(100, 150))).blocks())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), "vector of floats per row, found float32 of shape"),
        (np.zeros((5, 2), np.int64), "vector of floats per row, found int64"),
        (np.zeros((0, 4), np.float32), "holds 0 vectors"),
        (np.zeros((3, 0), np.float32), "3 vectors of 0 numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(save(tmp_path / "v.npy", array))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(3), "holds 3 ids, but"),
        (np.arange(NUM_VECTORS) - 1, "holds the id -1"),
        (np.arange(NUM_VECTORS) // 2, "holds 25 ids more than once, such as 0"),
        (np.arange(NUM_VECTORS, dtype=float), "whole number per row, found float64"),
        (np.arange(NUM_VECTORS)[:, None], "whole number per row"),
        (np.arange(NUM_VECTORS, dtype=np.uint64) + np.uint64(2**63), "below 2\\^63"),
    ],
)
def test_ids_that_cannot_be_are_refused(tmp_path: Path, ids: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(save(tmp_path / "v.npy", unit_vectors()), save(tmp_path / "i.npy", ids))


def test_unusable_files_are_named(tmp_path: Path) -> None:
    vectors = save(tmp_path / "v.npy", unit_vectors())
    for name in ("garbage.npy", "garbage.parquet", "absent.npy", "absent.parquet"):
        if name.startswith("garbage"):
            (tmp_path / name).write_bytes(b"garbage" * 9)
        for arguments in ([tmp_path / name], [vectors, tmp_path / name]):
            with pytest.raises(DataError, match=f"{name} cannot be read"):
                ArraySource(*arguments)
    with pytest.raises(DataError, match=r"garbage\.parquet cannot be read"):
        ArraySource(vectors, None, tmp_path / "garbage.parquet")
    with pytest.raises(DataError, match="holds 4 rows of metadata"):
        ArraySource(vectors, None, save_table(tmp_path / "m.parquet", a=range(4)))
    with pytest.raises(DataError, match="no column id; it has a"):
        ArraySource(vectors, tmp_path / "m.parquet")
    with pytest.raises(DataError, match="one column with a list of floats per row, found a"):
        ArraySource(tmp_path / "m.parquet")
    ragged = save_table(tmp_path / "r.parquet", v=pa.array([[1.0, 0.0], [1.0]], pa.list_(pa.float32())))
    with pytest.raises(DataError, match="gaps or lists of other lengths than 2 between rows 0 and 1"):
        list(ArraySource(ragged).blocks())
    np.savez(tmp_path / "several", a=unit_vectors())
    with pytest.raises(DataError, match="several arrays"):
        ArraySource(tmp_path / "several.npz")
