"""Random access, sequential reading, and what each says about damage."""

import gc
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shard_reader import read_shard
from data_pipelines.shard_set import ShardSet
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError, ManifestMismatch


@pytest.fixture
def copied(shard_set: ShardSet, tmp_path: Path) -> ShardSet:
    """A shard set that a test may damage."""
    shutil.copytree(shard_set.folder, tmp_path / "copied")
    with ShardSet.open(tmp_path / "copied") as opened:
        yield opened


def change_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_splits_select_rows_and_shards(shard_set):
    assert shard_set.splits == ["test", "train"]
    np.testing.assert_array_equal(shard_set.rows("test"), np.arange(7))
    np.testing.assert_array_equal(shard_set.rows("train"), np.arange(7, 27))
    np.testing.assert_array_equal(shard_set.rows(), np.arange(27))
    assert shard_set.shards_of("test") + shard_set.shards_of("train") == shard_set.shards_of() == shard_set.shard_names
    for ask in (shard_set.rows, shard_set.shards_of):
        with pytest.raises(DataError, match="no split 'val'; it has test, train"):
            ask("val")


def test_shards_are_read_in_row_order(shard_set):
    samples = [sample for name in shard_set.shard_names for sample in read_shard(shard_set, name)]
    assert [row for row, _ in samples] == list(range(shard_set.num_samples))
    assert all(data == shard_set.read_bytes(row) for row, data in samples)


def test_pickled_sets_read_the_same_and_notice_a_replacement(copied):
    again = pickle.loads(pickle.dumps(copied))
    assert again.read_bytes(3) == copied.read_bytes(3)
    pickled = pickle.dumps(copied)
    manifest = copied.folder / "manifest.json"
    changed = type(copied.manifest)(**{**manifest_fields(copied), "parents": {"other": "0" * 64}})
    manifest.write_text(
        manifest.read_text()
        .replace(copied.fingerprint, changed.fingerprint)
        .replace('"parents": {}', '"parents": {"other": "' + "0" * 64 + '"}')
    )
    with pytest.raises(ManifestMismatch, match="was replaced while it was in use"):
        pickle.loads(pickled)


def manifest_fields(shard_set: ShardSet) -> dict:
    return {name: getattr(shard_set.manifest, name) for name in shard_set.manifest.__slots__}


def test_threads_read_what_one_reader_reads(shard_set):
    expected = [shard_set.read_bytes(row) for row in range(shard_set.num_samples)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shard_set.read_bytes, list(range(shard_set.num_samples)) * 5)) == expected * 5


def test_closing_lets_go_of_every_file(copied):
    gc.collect()
    before = num_open_files()
    for row in range(copied.num_samples):
        copied.read_bytes(row)
    assert num_open_files() == before + len(copied.shard_names)
    copied.close()
    assert num_open_files() == before
    assert copied.read_bytes(0)


def test_a_reader_that_stops_early_leaves_no_file_open(copied):
    gc.collect()
    before = num_open_files()
    reading = read_shard(copied, copied.shard_names[0])
    next(reading)
    reading.close()
    assert num_open_files() == before


def test_only_few_shards_stay_open(copied, monkeypatch):
    monkeypatch.setattr("data_pipelines.shard_set._MAX_OPEN_SHARDS", 2)
    gc.collect()
    before = num_open_files()
    for row in range(copied.num_samples):
        copied.read_bytes(row)
    assert num_open_files() == before + 2


def test_a_garbled_tar_is_an_error_not_a_short_read(copied):
    """webdataset alone would end quietly here."""
    name = copied.shard_names[-1]
    second = copied.rows_of_shard(name)[1]
    header = copied.samples["offset"][second].as_py() - 512
    change_bytes(copied.folder / name, header, b"\xff" * 600)
    with pytest.raises(DataError, match=rf"{name} is damaged|{name} cannot be read"):
        list(read_shard(copied, name))


def test_a_cut_tar_is_an_error_for_both_readers(copied):
    name = copied.shard_names[-1]
    last = copied.rows_of_shard(name)[-1]
    os.truncate(copied.folder / name, copied.samples["offset"][last].as_py() + 10)
    with pytest.raises(DataError, match=name):
        list(read_shard(copied, name))
    with pytest.raises(ChecksumMismatch, match="ends inside sample"):
        copied.read_bytes(last)
    with pytest.raises(ChecksumMismatch, match=name):
        copied.check()


def test_a_missing_shard_is_named(copied):
    name = copied.shard_names[0]
    (copied.folder / name).unlink()
    with pytest.raises(ChecksumMismatch, match=f"{name} is missing"):
        copied.read_bytes(0)
    with pytest.raises(DataError, match=f"{name} is missing"):
        list(read_shard(copied, name))
    with pytest.raises(ChecksumMismatch, match=f"{name} is missing"):
        copied.check()
    with pytest.raises(DataError, match="has no shard"):
        list(read_shard(copied, "x.tar"))


def test_the_full_check_finds_a_flipped_byte(copied):
    copied.check(full=True)
    offset = copied.samples["offset"][5].as_py() + 20
    change_bytes(copied.folder / copied.samples["shard"][5].as_py(), offset, bytes([copied.read_bytes(5)[20] ^ 1]))
    copied.check()
    with pytest.raises(ChecksumMismatch, match="SHA-256"):
        copied.check(full=True)


def test_what_is_no_shard_set_is_refused(copied, tmp_path):
    with pytest.raises(ArtifactError, match="is not a finished shard set"):
        ShardSet.open(tmp_path)
    (copied.folder / "samples.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match="tables of shard set"):
        ShardSet.open(copied.folder)


def test_a_shard_is_not_closed_under_a_reader(shard_set, monkeypatch):
    """Another thread lets go of the shard just before it is read, and the descriptor's number goes to another file."""
    first, last = 0, shard_set.num_samples - 1
    expected = shard_set.read_bytes(first)
    read, opened = os.pread, []

    def read_after_another_thread(descriptor: int, size: int, offset: int) -> bytes:
        shard_set.close()
        gc.collect()
        other = shard_set.folder / shard_set.samples["shard"][last].as_py()
        opened.append(os.open(other, os.O_RDONLY))
        return read(descriptor, size, offset)

    monkeypatch.setattr("data_pipelines.shard_set.os.pread", read_after_another_thread)
    assert shard_set.read_bytes(first) == expected
    for descriptor in opened:
        os.close(descriptor)
