"""A compaction on a disk that is full: a small one in memory, which only a process of its own sees."""

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from indexing.building.build import build_index
from indexing.index_files import read_faiss_index, write_faiss_index
from indexing.living.compaction import compact_index
from indexing.living.live_index import LiveIndex
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from indexing.versions import current_version, versions_of
from lookalike.errors import ResourceError
from lookalike.native_libraries import load_faiss
from tests.small_index import content, units
from tests.unit.indexing.clustered_vectors import clustered

ROOT = Path(__file__).parents[3]
PAGE = 4096  # tmpfs gives room in pages
MOUNTED = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'


def command_on_small_disk(folder: Path, command: list[str]) -> list[str]:
    """`command` with a small disk at `folder`, which vanishes with it; skips where the system lets nobody mount one."""
    for rights in (["--user", "--map-root-user"], []):
        inside = ["unshare", *rights, "--mount", "sh", "-c", MOUNTED, str(folder)]
        if shutil.which("unshare") and subprocess.run([*inside, "true"], capture_output=True).returncode == 0:
            return [*inside, *command]
    pytest.skip("no disk can be mounted here")


@pytest.mark.parametrize("type_name", ["Flat", "IVF8,SQ8", "HNSW8,SQ8"])
def test_a_compaction_on_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(
    tmp_path: Path, type_name: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    child = [sys.executable, "-m", "tests.unit.indexing.test_full_disk", str(tmp_path), str(disk), type_name]
    done = subprocess.run(command_on_small_disk(disk, child), cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def compact_with_ever_more_room(source: Path, disk: Path, type_name: str) -> None:
    """From none, page by page: so every file that a compaction writes meets the end of the disk."""
    folder, ballast = disk / "index", disk / "ballast"
    vectors, ids = clustered(600)
    np.save(source / "vectors.npy", vectors)
    np.save(source / "ids.npy", ids)
    build_index(
        ArraySource(source / "vectors.npy", source / "ids.npy"), folder, IndexSettings(type=type_name, recall=0.5)
    )
    with closing(LiveIndex.open(folder)) as live:
        live.add(units(700, 701), [{"key": "a"}, {}])
        live.delete(ids[:2].copy())
        live.replace(ids[2:3].copy(), units(703), [{"key": "other"}])
        acknowledged = content(live)
        room = shutil.disk_usage(disk).free
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room)
        # As if the room went only after it was asked for.
        shutil.disk_usage = lambda folder: SimpleNamespace(free=room)  # type: ignore[assignment]
        refusals = []
        for taken in range(room - PAGE, 0, -PAGE):
            try:
                compact_index(folder, keep_versions=1)
                break
            except ResourceError as error:
                refusals.append(str(error))
            assert current_version(folder) == "v0001"
            assert content(live) == acknowledged
            with closing(LiveIndex.open(folder)) as reopened:
                assert content(reopened) == acknowledged
            os.truncate(ballast, taken)
        for place in ("changes.sqlite cannot be used", f"{folder} is full. Free", "full: a copy of the vectors needs"):
            assert any(place in refusal for refusal in refusals), place
        assert all("has room" in refusal or "Free some and run the same" in refusal for refusal in refusals)
        assert versions_of(folder) == ["v0002"]
        assert content(live) == acknowledged
    with closing(LiveIndex.open(folder)) as reopened:
        assert content(reopened) == acknowledged
        assert reopened.num_changes == 0
        reopened.view().base.check()
    assert not list(folder.glob(".un*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_last_bytes_of_a_faiss_index_are_not_lost_in_silence(tmp_path: Path) -> None:
    """An index that is smaller than the buffers on its way."""
    index = load_faiss().IndexFlatIP(4)
    index.add(np.eye(4, dtype=np.float32))
    with pytest.raises(OSError, match="No space left"):
        write_faiss_index(index, Path("/dev/full"))
    write_faiss_index(index, tmp_path / "index.faiss")
    load_faiss().write_index(index, str(tmp_path / "by_faiss"))
    assert (tmp_path / "index.faiss").read_bytes() == (tmp_path / "by_faiss").read_bytes()
    assert read_faiss_index(tmp_path).ntotal == 4


if __name__ == "__main__":
    compact_with_ever_more_room(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
