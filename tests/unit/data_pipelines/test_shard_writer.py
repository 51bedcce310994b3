"""The same pictures give the same bytes: with any number of processes, and after any kill."""

import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from data_pipelines.decode import DecodeLimits
from data_pipelines.settings import ClassFoldersSettings, ListingSettings, Reencode, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from data_pipelines.sources.listing import Listing
from data_pipelines.sources.webdataset_tars import WebDatasetTars
from lookalike.errors import ArtifactError, DataError, ResourceError
from tests.unit.data_pipelines.small_shards import (
    SMALL_SHARDS,
    write_class_folders,
    write_picture,
    write_small_shards,
)


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes of a shard set; of the manifest, what does not depend on the commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    return {**files, "manifest.json": json.dumps({**manifest, "made_by": None}).encode()}


def source_of(folder: Path) -> ClassFolders:
    return ClassFolders(ClassFoldersSettings(folder=folder))


def test_the_table_describes_every_picture(pictures, tmp_path):
    shard_set = write_small_shards(pictures, tmp_path / "shards")
    assert shard_set.num_samples == 20
    assert len(shard_set.shard_names) > 2
    assert shard_set.class_names == [f"class {n}" for n in range(2, 7)]
    for row, sample in enumerate(shard_set.samples.to_pylist()):
        original = pictures / sample["class_name"] / f"{sample['key'].rpartition('/')[2]}.jpg"
        assert shard_set.read_bytes(row) == original.read_bytes()
        with Image.open(original) as image:
            assert image.size == (sample["width"], sample["height"])
        assert shard_set.class_names[sample["label"]] == sample["class_name"]
        assert (sample["split"], sample["extension"]) == ("all", "jpg")


# The library leaves closing its shards to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_any_webdataset_reader_opens_the_shards(shard_set):
    paths = [str(shard_set.folder / name) for name in shard_set.shard_names]
    stream = webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json")
    samples = list(stream)
    del stream
    gc.collect()
    assert [key for key, _, _ in samples] == shard_set.samples["key"].to_pylist()
    for (_, image, facts), row in zip(samples, shard_set.samples.to_pylist(), strict=True):
        assert image.size == (row["width"], row["height"])
        assert facts == {name: row[name] for name in ("key", "label", "class_name", "coarse_label", "split")}


def test_a_shard_holds_one_split_and_respects_its_size(shard_set):
    for name in shard_set.shard_names:
        rows = shard_set.rows_of_shard(name)
        part = shard_set.samples.slice(rows.start, len(rows))
        assert set(part["split"].to_pylist()) == {name.rpartition("-")[0]}
        assert sum(part["size"].to_pylist()) <= SMALL_SHARDS.max_shard_bytes


def test_one_and_two_processes_write_the_same_bytes(pictures, tmp_path):
    one = write_shards(source_of(pictures), tmp_path / "one", SMALL_SHARDS, num_processes=1)
    two = write_shards(source_of(pictures), tmp_path / "two", SMALL_SHARDS, num_processes=2)
    assert contents(one.folder) == contents(two.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pictures", "two"]


# Ends itself as `kill -9` would, within a picture of the third shard.
KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from data_pipelines import shard_writer
from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.sources.class_folders import ClassFolders
add_member, calls = shard_writer._add_member, []

def dying(archive, name, data):
    calls.append(archive)
    if len(set(map(id, calls))) == 3 and calls.count(archive) == 2:
        archive.fileobj.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return add_member(archive, name, data)

shard_writer._add_member = dying
source = ClassFolders(ClassFoldersSettings(folder=Path(sys.argv[1])))
shard_writer.write_shards(source, Path(sys.argv[2]), ShardSettings(max_shard_bytes=4096), num_processes=1)
"""

# Ends itself once the first shard is there, while both workers write on; prints their process ids.
KILLED_WITH_WORKERS = """
import multiprocessing, os, signal, sys
from pathlib import Path
from data_pipelines import shard_writer
from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.sources.class_folders import ClassFolders

def dying(shard, staging):
    if shard_writer._is_finished(shard, staging):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    shard_writer._num_quarantined = dying
    source = ClassFolders(ClassFoldersSettings(folder=Path(sys.argv[1])))
    shard_writer.write_shards(source, Path(sys.argv[2]), ShardSettings(max_shard_bytes=4096), num_processes=2)
"""


def run_until_killed(program: str, tmp_path: Path, pictures: Path, folder: Path) -> str:
    script = tmp_path / "killed.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, str(script), str(pictures), str(folder)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    return result.stdout


def test_a_killed_run_continues_to_the_same_bytes(pictures, tmp_path, caplog):
    run_until_killed(KILLED_WHILE_WRITING, tmp_path, pictures, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    staged = tmp_path / ".unfinished-shards" / "all-000000.tar"
    written = staged.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        continued = write_small_shards(pictures, tmp_path / "shards")
    assert "continuing: 2 of" in caplog.text
    assert (continued.folder / "all-000000.tar").stat().st_mtime_ns == written
    assert not staged.parent.exists()
    assert contents(continued.folder) == contents(write_small_shards(pictures, tmp_path / "whole").folder)


def test_workers_end_with_their_killed_parent(pictures, tmp_path):
    printed = run_until_killed(KILLED_WITH_WORKERS, tmp_path, pictures, tmp_path / "shards")
    workers = [int(text) for text in printed.split()]
    assert workers
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
    continued = write_small_shards(pictures, tmp_path / "shards")
    assert contents(continued.folder) == contents(write_small_shards(pictures, tmp_path / "whole").folder)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_changed_source_discards_what_was_staged(pictures, tmp_path):
    run_until_killed(KILLED_WHILE_WRITING, tmp_path, pictures, tmp_path / "shards")
    write_picture(pictures / "class 2" / "00.jpg", seed=99)
    shard_set = write_small_shards(pictures, tmp_path / "shards")
    assert shard_set.read_bytes(0) == (pictures / "class 2" / "00.jpg").read_bytes()


def test_a_finished_shard_set_is_reused_or_refused(pictures, tmp_path, caplog):
    first = write_small_shards(pictures, tmp_path / "shards")
    with caplog.at_level("INFO"):
        again = write_small_shards(pictures, tmp_path / "shards")
    assert "is finished already" in caplog.text
    assert again.fingerprint == first.fingerprint
    with pytest.raises(ArtifactError, match="from other pictures or settings"):
        write_shards(source_of(pictures), tmp_path / "shards", ShardSettings())
    write_picture(pictures / "class 9" / "00.jpg", seed=99)
    with pytest.raises(ArtifactError, match="from other pictures or settings"):
        write_small_shards(pictures, tmp_path / "shards")


def test_a_copy_of_the_pictures_gives_the_same_fingerprint(tmp_path):
    sets = [
        write_small_shards(write_class_folders(tmp_path / name, {"a": 3}), tmp_path / f"{name}-shards")
        for name in ("one", "two")
    ]
    assert sets[0].fingerprint == sets[1].fingerprint


def test_two_writers_do_not_share_a_folder(pictures, tmp_path, monkeypatch):
    def write_again(*_: object, **__: object) -> None:
        write_small_shards(pictures, tmp_path / "shards")

    monkeypatch.setattr("data_pipelines.shard_writer._write_missing_shards", write_again)
    with pytest.raises(ResourceError, match="another process is writing"):
        write_small_shards(pictures, tmp_path / "shards")


BAD = {"empty.jpg": b"", "page.jpg": b"<html>404</html>", "vector.png": b"<svg/>"}


def add_bad_pictures(folder: Path) -> None:
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    whole = (folder / "00.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])


def test_bad_pictures_are_quarantined_and_counted(pictures, tmp_path):
    add_bad_pictures(pictures / "class 6")
    settings = SMALL_SHARDS.model_copy(update={"max_quarantine_share": 0.2})
    shard_set = write_shards(source_of(pictures), tmp_path / "shards", settings)
    assert shard_set.num_samples == 20
    assert shard_set.manifest.details["num_quarantined"] == 4
    quarantined = parquet.read_table(shard_set.folder / "quarantine.parquet").to_pylist()
    assert {Path(entry["path"]).name: entry["reason"] for entry in quarantined} == {
        "empty.jpg": "empty",
        "page.jpg": "not_an_image",
        "vector.png": "not_an_image",
        "half.jpg": "truncated",
    }
    assert all(shard_set.read_bytes(row) for row in range(20))


def test_too_many_bad_pictures_are_an_error_that_names_their_list(pictures, tmp_path):
    add_bad_pictures(pictures / "class 6")
    with pytest.raises(
        DataError, match=r"at least 4 of 24 pictures are bad \(.*2 not_an_image.*\), 1.00% are"
    ) as caught:
        write_shards(source_of(pictures), tmp_path / "shards", ShardSettings())
    assert not (tmp_path / "shards").exists()
    listing = tmp_path / ".unfinished-shards" / "quarantine.parquet"
    assert str(listing) in str(caught.value)
    assert parquet.read_table(listing).num_rows == 4
    # Allowing them does not repeat the work.
    tolerant = ShardSettings(max_quarantine_share=0.2)
    assert write_shards(source_of(pictures), tmp_path / "shards", tolerant).num_samples == 20


def test_a_source_of_bad_pictures_only_is_an_error(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "empty.jpg").touch()
    with pytest.raises(DataError, match="1 of 1 pictures are bad"):
        write_shards(source_of(tmp_path / "pictures"), tmp_path / "shards", ShardSettings(max_quarantine_share=1))


def test_limits_travel_with_the_shard_set(pictures, tmp_path):
    settings = ShardSettings(limits=DecodeLimits(max_side=44), max_quarantine_share=0.5)
    shard_set = write_shards(source_of(pictures), tmp_path / "shards", settings)
    assert shard_set.manifest.details["num_quarantined"] == 0
    assert ShardSet.open(shard_set.folder).decode_limits == settings.limits


def test_reencoding_shrinks_and_turns_upright(tmp_path):
    (tmp_path / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40), "red").save(tmp_path / "pictures" / "turned.png", exif=exif)
    settings = ShardSettings(encoding=Reencode(max_side=32, quality=80))
    shard_set = write_shards(source_of(tmp_path / "pictures"), tmp_path / "shards", settings)
    (sample,) = shard_set.samples.to_pylist()
    assert (sample["width"], sample["height"], sample["extension"]) == (16, 32, "jpg")
    assert shard_set.read_bytes(0).startswith(b"\xff\xd8\xff")


def test_the_extension_follows_the_bytes_not_the_name(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "mislabelled.jpg", "PNG")
    shard_set = write_small_shards(tmp_path / "pictures", tmp_path / "shards")
    with tarfile.open(shard_set.folder / "all-000000.tar") as archive:
        assert archive.getnames() == ["mislabelled.png", "mislabelled.json"]
    assert shard_set.labels.tolist() == [-1]


def test_long_keys_keep_their_offsets(tmp_path):
    names = [f"{'deep/' * 40}{'x' * 120}{index}.jpg" for index in range(3)]
    for seed, name in enumerate(names):
        write_picture(tmp_path / "pictures" / "class" / name, seed)
    shard_set = write_small_shards(tmp_path / "pictures", tmp_path / "shards")
    for row, name in enumerate(names):
        assert shard_set.read_bytes(row) == (tmp_path / "pictures" / "class" / name).read_bytes()


def test_classes_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    write_class_folders(tmp_path / "pictures", {"10": 1, "9": 1, "2": 1})
    shard_set = write_small_shards(tmp_path / "pictures", tmp_path / "shards")
    assert shard_set.class_names == ["2", "9", "10"]
    np.testing.assert_array_equal(np.sort(shard_set.labels), [0, 1, 2])


def test_a_listing_brings_coarse_labels(tmp_path):
    write_picture(tmp_path / "1.jpg", 0)
    (tmp_path / "list.csv").write_text("path,label,coarse_label,split\n1.jpg,sparrow,bird,gallery\n")
    source = Listing(ListingSettings(file=tmp_path / "list.csv"))
    (sample,) = write_shards(source, tmp_path / "shards", SMALL_SHARDS).samples.to_pylist()
    assert (sample["class_name"], sample["coarse_label"], sample["split"]) == ("sparrow", "bird", "gallery")


def test_a_file_that_could_not_be_opened_is_tried_again(pictures, tmp_path, monkeypatch):
    """Mounting or chmod changes neither size nor time: the shard must not be kept as it was."""
    bad = next(iter(sorted(pictures.rglob("*.jpg"))))
    open_file = Path.open

    def refused(self: Path, *arguments: str, **options: str) -> object:
        if self == bad:
            raise PermissionError(13, "Permission denied")
        return open_file(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        with pytest.raises(DataError, match="unreadable"):
            write_small_shards(pictures, tmp_path / "shards")
    with write_small_shards(pictures, tmp_path / "shards") as shard_set:
        assert shard_set.manifest.details["num_quarantined"] == 0


def test_another_file_under_an_old_key_is_another_set(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_picture(tmp_path / f"{name}.bmp", seed)  # uncompressed: both have one size
        os.utime(tmp_path / f"{name}.bmp", (1, 1))
    listing = tmp_path / "listing.csv"
    listing.write_text("path,key\na.bmp,k1\n")
    source = Listing(ListingSettings(file=listing))
    write_shards(source, tmp_path / "shards", SMALL_SHARDS)
    listing.write_text("path,key\nb.bmp,k1\n")
    with pytest.raises(ArtifactError, match="other pictures"):
        write_shards(source, tmp_path / "shards", SMALL_SHARDS)


def test_another_picture_of_the_same_tar_is_another_set(tmp_path):
    for name, seed in (("left", 1), ("right", 2)):
        write_picture(tmp_path / f"{name}.bmp", seed)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "x.tar", "w") as archive:
        for name in ("left", "right"):
            archive.add(tmp_path / f"{name}.bmp", f"sample.{name}.bmp")

    def source(file: str) -> WebDatasetTars:
        return WebDatasetTars(folder=tmp_path / "tars", picture_file=file)

    write_shards(source("left.bmp"), tmp_path / "shards", SMALL_SHARDS)
    with pytest.raises(ArtifactError, match="other pictures"):
        write_shards(source("right.bmp"), tmp_path / "shards", SMALL_SHARDS)


def test_a_moved_source_is_still_the_same_set(pictures, tmp_path):
    first = write_small_shards(pictures, tmp_path / "shards")
    pictures.rename(tmp_path / "moved")
    with first, write_small_shards(tmp_path / "moved", tmp_path / "shards") as again:
        assert again.fingerprint == first.fingerprint
