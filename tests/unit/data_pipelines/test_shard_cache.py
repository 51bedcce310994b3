"""Shards that lie elsewhere are read as if they lay here, fetched once, and never trusted unseen."""

import fcntl
import functools
import gc
import hashlib
import http.server
import json
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from data_pipelines.check import check_shard_set
from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.loader import training_batches
from data_pipelines.settings import AugmentationSettings, ShardCacheSettings
from data_pipelines.shard_reader import read_shard
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import TrainingTransform
from lookalike.artifacts import Manifest
from lookalike.errors import ArtifactError, DataError, ResourceError
from lookalike.world import World
from tests.unit.data_pipelines.small_shards import write_class_folders, write_small_shards


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback; the first `failures[name]` requests for a file fail."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.failures: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.server.requests[name] += 1
        if self.server.requests[name] <= self.server.failures.get(name, 0):
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shard_set: ShardSet) -> Iterator[Server]:
    with Server(shard_set.folder) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCacheSettings:
    return ShardCacheSettings(folder=tmp_path / "cache", num_attempts=3, first_wait_seconds=0.001)


@pytest.fixture
def in_memory(shard_set: ShardSet) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.put(str(shard_set.folder), "/bucket/shards", recursive=True)
    yield "memory://bucket/shards"
    files.rm("/bucket", recursive=True)


def shards_in(cache: ShardCacheSettings) -> list[Path]:
    return sorted((cache.folder / "shards").glob("*.tar"))


def everything(shard_set: ShardSet) -> list[bytes]:
    return [shard_set.read_bytes(row) for row in range(shard_set.num_samples)]


def test_a_remote_set_reads_like_a_local_one(shard_set, in_memory, cache):
    with ShardSet.open(in_memory, cache=cache) as remote:
        assert remote.fingerprint == shard_set.fingerprint
        assert shards_in(cache) == []
        assert everything(remote) == everything(shard_set)
        assert len(shards_in(cache)) == len(shard_set.shard_names)
        for name in shard_set.shard_names:
            assert list(read_shard(remote, name)) == list(read_shard(shard_set, name))
        assert check_shard_set(remote, full=True).findings == ()


def test_what_was_fetched_survives_the_process_and_the_source(shard_set, in_memory, cache):
    with ShardSet.open(in_memory, cache=cache) as remote:
        expected = everything(remote)
        pickled = pickle.dumps(remote)
    fsspec.filesystem("memory").rm("/bucket/shards/*.tar")
    with ShardSet.open(in_memory, cache=cache) as remote, pickle.loads(pickled) as unpickled:
        assert everything(remote) == everything(unpickled) == expected


def test_a_download_that_fails_is_tried_again(shard_set, server, cache):
    name = shard_set.shard_names[0]
    server.failures = {"manifest.json": 1, "samples.parquet": 1, name: 2}
    with ShardSet.open(server.url, cache=cache) as remote:
        assert remote.read_bytes(0) == shard_set.read_bytes(0)
    assert server.requests[name] == 3


def test_a_download_that_keeps_failing_names_the_shard(shard_set, server, cache):
    name = shard_set.shard_names[0]
    server.failures = {name: 1000}
    with ShardSet.open(server.url, cache=cache) as remote:
        with pytest.raises(DataError, match=rf"{server.url}/{name} could not be fetched in 3 attempts: 503"):
            remote.read_bytes(0)
        with pytest.raises(DataError, match=name):
            list(read_shard(remote, name))
        # The others are there all the same.
        assert remote.read_bytes(shard_set.num_samples - 1) == shard_set.read_bytes(shard_set.num_samples - 1)


def test_wrong_bytes_are_never_kept(shard_set, in_memory, cache):
    name = shard_set.shard_names[0]
    files = fsspec.filesystem("memory")
    data = bytearray(files.cat_file(f"/bucket/shards/{name}"))
    data[700] ^= 1
    files.pipe_file(f"/bucket/shards/{name}", bytes(data))
    with (
        ShardSet.open(in_memory, cache=cache) as remote,
        pytest.raises(DataError, match=f"{name} could not be fetched"),
    ):
        remote.read_bytes(0)
    assert shards_in(cache) == []
    assert list((cache.folder / "shards").glob("*.partial")) == []


def test_what_is_not_there_is_not_asked_for_twice(shard_set, server, cache):
    with pytest.raises(DataError, match=r"nothing/manifest.json does not exist"):
        ShardSet.open(f"{server.url}/nothing", cache=cache)
    assert server.requests["manifest.json"] == 1


def test_an_address_without_a_cache_is_refused(in_memory):
    with pytest.raises(ValueError, match="needs a cache"):
        ShardSet.open(in_memory)


def test_another_artifact_is_refused(in_memory, cache):
    fsspec.filesystem("memory").pipe_file("/bucket/shards/manifest.json", b"{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        ShardSet.open(in_memory, cache=cache)


def test_workers_of_training_read_through_the_cache(shard_set, server, cache):
    def batches_of(opened: ShardSet, num_workers: int) -> list:
        rows = opened.rows("train")
        plan = ClassBalancedBatches(opened.labels, rows, classes_per_batch=2, images_per_class=4, seed=0)
        transform = TrainingTransform(AugmentationSettings(), 16)
        return list(
            training_batches(opened, plan, transform, world=World(), seed=0, steps=range(6), num_workers=num_workers)
        )

    with ShardSet.open(server.url, cache=cache) as remote:
        for found, expected in zip(batches_of(remote, 2), batches_of(shard_set, 0), strict=True):
            assert torch.equal(found.pixels, expected.pixels)
    assert max(server.requests[name] for name in shard_set.shard_names) == 1


READING = """
import sys
from pathlib import Path
from data_pipelines.settings import ShardCacheSettings
from data_pipelines.shard_set import ShardSet
with ShardSet.open(sys.argv[1], cache=ShardCacheSettings(folder=Path(sys.argv[2]))) as remote:
    print(sum(len(remote.read_bytes(row)) for row in range(remote.num_samples)))
"""


def test_processes_fetch_each_shard_once(shard_set, server, cache):
    command = [sys.executable, "-c", READING, server.url, str(cache.folder)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = sum(map(len, everything(shard_set)))
    assert [int(reader.communicate()[0]) for reader in readers] == [expected, expected]
    assert [server.requests[name] for name in shard_set.shard_names] == [1] * len(shard_set.shard_names)


@pytest.fixture
def small_cache(shard_set: ShardSet, cache: ShardCacheSettings) -> ShardCacheSettings:
    """Keeps two shards, whichever they are, and never all."""
    sizes = sorted(shard_set.manifest.files[name]["bytes"] for name in shard_set.shard_names)
    return cache.model_copy(update={"max_bytes": sizes[-1] + sizes[-2]})


def test_the_cache_stays_within_its_size(shard_set, in_memory, small_cache):
    with ShardSet.open(in_memory, cache=small_cache) as remote:
        for row in range(shard_set.num_samples):
            assert remote.read_bytes(row) == shard_set.read_bytes(row)
            assert sum(path.stat().st_size for path in shards_in(small_cache)) <= small_cache.max_bytes


def test_the_least_recently_used_shard_goes_first(shard_set, in_memory, small_cache):
    first, second, third = (shard_set.rows_of_shard(name)[0] for name in shard_set.shard_names[:3])
    with ShardSet.open(in_memory, cache=small_cache) as remote:
        sha256 = [remote.manifest.files[name]["sha256"] for name in shard_set.shard_names[:3]]
        for row in (first, second, first, third):
            remote.read_bytes(row)
            remote.close()
    kept = {path.stem for path in shards_in(small_cache)}
    assert sha256[2] in kept
    assert sha256[1] not in kept


def test_an_evicted_shard_stays_readable_and_is_let_go_of(shard_set, in_memory, small_cache):
    with ShardSet.open(in_memory, cache=small_cache) as reader, ShardSet.open(in_memory, cache=small_cache) as other:
        reader.read_bytes(0)
        everything(other)
        assert num_deleted_files() >= 1
        fsspec.filesystem("memory").mv("/bucket/shards/" + shard_set.shard_names[0], "/bucket/elsewhere")
        assert reader.read_bytes(1) == shard_set.read_bytes(1)
        reader.read_bytes(shard_set.rows_of_shard(shard_set.shard_names[1])[0])
        other.close()
        gc.collect()
        assert num_deleted_files() == 0


def num_deleted_files() -> int:
    """Open files that are no more in any folder."""
    return sum(
        str(link.readlink()).endswith(".tar (deleted)") for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )


def test_a_shard_larger_than_the_cache_is_refused(in_memory, cache):
    tiny = cache.model_copy(update={"max_bytes": 100})
    with ShardSet.open(in_memory, cache=tiny) as remote, pytest.raises(ResourceError, match="Allow it more"):
        remote.read_bytes(0)


def test_what_a_killed_download_left_is_cleared(shard_set, in_memory, cache):
    with ShardSet.open(in_memory, cache=cache) as remote:
        left = cache.folder / "shards" / f"{'0' * 64}.partial"
        left.write_bytes(b"half")
        remote.read_bytes(0)
    assert not left.exists()


def test_a_replaced_set_is_read_anew(in_memory, cache, tmp_path):
    with ShardSet.open(in_memory, cache=cache) as remote:
        before = remote.fingerprint
    pictures = write_class_folders(tmp_path / "pictures", {"one": 2, "two": 3})
    with write_small_shards(pictures, tmp_path / "shards") as written:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)
        fsspec.filesystem("memory").put(str(written.folder), "/bucket/shards", recursive=True)
        with ShardSet.open(in_memory, cache=cache) as remote:
            assert before != remote.fingerprint == written.fingerprint
            assert everything(remote) == everything(written)


def forge_manifest(in_memory: str, change) -> None:
    """Rewrites the remote manifest as a hostile server could: its own fingerprint fits again."""
    files = fsspec.filesystem("memory")
    tree = json.loads(files.cat_file("/bucket/shards/manifest.json"))
    change(tree)
    tree.pop("fingerprint")
    tree["fingerprint"] = Manifest(**tree).fingerprint
    files.pipe_file("/bucket/shards/manifest.json", json.dumps(tree).encode())


@pytest.mark.parametrize("name", ["../../../victim/file", "/victim/file", "a/b", "origin.json", "manifest.json", ".x"])
def test_a_manifest_that_reaches_outside_the_set_is_refused(in_memory, cache, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    fsspec.filesystem("memory").pipe_file("/bucket/shards/x", b"evil")
    entry = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    forge_manifest(in_memory, lambda tree: tree["files"].update({name.replace("/victim", str(victim)): entry}))
    with pytest.raises(ArtifactError, match="no shard set holds"):
        ShardSet.open(in_memory, cache=cache)
    assert (victim / "file").read_text() == "mine"


def test_a_checksum_that_is_a_path_is_refused(shard_set, in_memory, cache, tmp_path):
    forge_manifest(in_memory, lambda tree: tree["files"][shard_set.shard_names[0]].update(sha256="../../../outside"))
    with pytest.raises(ArtifactError, match="no shard set holds"):
        ShardSet.open(in_memory, cache=cache)
    assert not list(tmp_path.glob("outside*"))


def test_a_manifest_without_a_shard_it_describes_is_refused(shard_set, in_memory, cache):
    forge_manifest(in_memory, lambda tree: tree["files"].pop(shard_set.shard_names[0]))
    with pytest.raises(ArtifactError, match=shard_set.shard_names[0]):
        ShardSet.open(in_memory, cache=cache)


def test_eviction_never_touches_files_of_others(shard_set, in_memory, tmp_path):
    own = tmp_path / "project" / "shards"
    own.mkdir(parents=True)
    names = ["train-000000.tar", "notes.partial", "0123.tar"]
    for name in names:
        (own / name).write_bytes(b"mine" * 1000)
    largest = max(shard_set.manifest.files[name]["bytes"] for name in shard_set.shard_names)
    with ShardSet.open(in_memory, cache=ShardCacheSettings(folder=own.parent, max_bytes=largest)) as remote:
        everything(remote)  # each shard evicts the one before
    assert [(own / name).read_bytes() for name in names] == [b"mine" * 1000] * 3


def test_a_shard_cut_by_a_power_loss_is_fetched_again(shard_set, in_memory, cache):
    with ShardSet.open(in_memory, cache=cache) as remote:
        expected = everything(remote)
    for path in shards_in(cache):
        path.write_bytes(b"")
    with ShardSet.open(in_memory, cache=cache) as remote:
        assert everything(remote) == expected


def test_a_cache_that_cannot_be_used_is_named(in_memory, cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=str(tmp_path / "file")):
        ShardSet.open(in_memory, cache=ShardCacheSettings(folder=tmp_path / "file"))
    with ShardSet.open(in_memory, cache=cache) as remote:

        def refuse(*_: object, **__: object) -> int:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("data_pipelines.shard_cache.os.open", refuse)
        with pytest.raises(ResourceError, match="Read-only"):
            remote.read_bytes(0)


def test_a_leftover_is_removed_under_its_lock(shard_set, in_memory, cache, monkeypatch):
    """Else a download that starts just then writes into a file that is on its way out."""
    leftover = cache.folder / "shards" / f"{'0' * 64}.partial"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    unlink, free_at_removal = Path.unlink, []

    def watched(self: Path, missing_ok: bool = False) -> None:
        if self == leftover and self.exists():
            with leftover.with_suffix(".lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    free_at_removal.append(True)
                except BlockingIOError:
                    free_at_removal.append(False)
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    with ShardSet.open(in_memory, cache=cache) as remote:
        everything(remote)
    assert free_at_removal == [False]
    assert not leftover.exists()
