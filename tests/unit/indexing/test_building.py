"""Building an index: what it holds, how it survives kills, and what it refuses."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

import tests.gloo_ranks  # noqa: F401 - its processes are started like ours, with torch loaded beforehand
from indexing.building import graph, partitions, store_writer
from indexing.building.build import build_index, plan_build
from indexing.building.gpu import create_assigner, num_gpus
from indexing.building.staging import full_disk_explained, open_staging
from indexing.building.training import train_centroids
from indexing.building.verification import require_ids_found, require_rows_under_their_ids
from indexing.index_files import read_faiss_index, write_faiss_index
from indexing.index_types import IndexType, create_untrained
from indexing.planning import calibration, planner
from indexing.published_index import PublishedIndex
from indexing.settings import IndexSettings
from indexing.vector_source import VectorBlock
from indexing.vector_store import VectorStore
from indexing.versions import versions_of
from lookalike.errors import ArtifactError, DataError, ResourceError, SettingsError
from lookalike.exact_search import exact_search
from lookalike.native_libraries import load_faiss
from lookalike.records import Effort, SearchParameters
from tests.unit.indexing.clustered_vectors import clustered, metadata_for, open_source_files, write_source

NUM_VECTORS = 1500
TYPES = ("Flat", "IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "IVF8,RaBitQ", "HNSW8", "HNSW8,SQ8")
_context = multiprocessing.get_context("forkserver")


def settings_for(index_type: str, **wishes: Any) -> IndexSettings:
    return IndexSettings(type=index_type, recall=0.5, num_measured_queries=10, **wishes)


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder, NUM_VECTORS)
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    make_parts_small(monkeypatch.setattr)


def make_parts_small(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """So that a small collection goes through every stage several times."""
    set_attribute(partitions, "BYTES_PER_BLOCK", 400 * 16 * 4)
    set_attribute(graph, "ROWS_PER_BLOCK", 400)
    set_attribute(graph, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    set_attribute(store_writer, "BYTES_BETWEEN_SYNCS", 1)
    set_attribute(store_writer, "METADATA_ROWS_PER_BATCH", 400)
    # What this machine's speed is takes seconds to find out, and has no bearing on what is built.
    set_attribute(planner, "measure_rates", calibration.nominal_rates)


@pytest.mark.parametrize("index_type", TYPES)
@pytest.mark.usefixtures("small_parts")
def test_every_type_finds_vectors_under_their_ids_and_metadata(
    source_folder: Path, tmp_path: Path, index_type: str
) -> None:
    index = build_index(open_source_files(source_folder), tmp_path / "index", settings_for(index_type))
    vectors, ids = clustered(NUM_VECTORS)
    np.testing.assert_array_equal(index.ids(), np.sort(ids))
    np.testing.assert_array_equal(index.vectors_of(ids), vectors)
    queries, _ = clustered(20, seed=1)
    truth = exact_search(queries, vectors, ids, k=10)
    np.testing.assert_array_equal(index.search(queries, SearchParameters(exact=True)).ids, truth.ids)
    found = index.search(queries, SearchParameters(effort=Effort(num_probes=8, breadth=256, candidates_per_hit=40)))
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found.ids, truth.ids, strict=True)])
    assert recall > 0.97
    assert index.metadata_of(ids[:50]) == metadata_for(ids[:50]).to_pylist()
    assert (tmp_path / "index").joinpath("CURRENT").read_text() == "v0001\n"
    assert [path.name for path in (tmp_path / "index").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("index_type", ["IVF8,Flat", "IVF8,SQ8", "IVF8,RaBitQ"])
@pytest.mark.usefixtures("small_parts")
def test_merged_parts_hold_what_one_plain_faiss_index_would(
    source_folder: Path, tmp_path: Path, index_type: str
) -> None:
    index = build_index(open_source_files(source_folder), tmp_path / "index", settings_for(index_type))
    merged = read_faiss_index(index.folder)
    plain = read_faiss_index(index.folder)
    lists = load_faiss().ArrayInvertedLists(plain.nlist, plain.code_size)
    plain.replace_invlists(lists, True)
    lists.this.disown()
    plain.ntotal = 0
    plain.add_with_ids(np.ascontiguousarray(index.store.vectors), np.ascontiguousarray(index.store.ids))
    assert merged.ntotal == plain.ntotal == NUM_VECTORS
    for number in range(8):
        (ids, codes), (plain_ids, plain_codes) = entries(merged, number), entries(plain, number)
        np.testing.assert_array_equal(ids, plain_ids)
        np.testing.assert_array_equal(codes, plain_codes)


def entries(index: Any, number: int) -> tuple[ndarray, ndarray]:
    faiss = load_faiss()
    lists = index.invlists
    size = lists.list_size(number)
    return (
        faiss.rev_swig_ptr(lists.get_ids(number), size).copy(),
        faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size).copy(),
    )


def build_and_die(
    source_folder: Path, folder: Path, index_type: str, steps_to_live: int | None, dies_before: bool
) -> None:
    """In a process of its own: builds, and kills itself around the rename that finishes a step."""
    make_parts_small(setattr)
    if steps_to_live is not None:
        left = [steps_to_live]

        def counted(rename: Callable[..., Any]) -> Callable[..., Any]:
            def rename_or_die(self: Path, target: Path) -> Any:
                left[0] -= 1
                if left[0] == 0 and dies_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = rename(self, target)
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return rename_or_die

        Path.replace = counted(Path.replace)  # type: ignore[method-assign]
        Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    build_index(open_source_files(source_folder), folder, settings_for(index_type))


def run_build(*arguments: Any) -> int | None:
    process = _context.Process(target=build_and_die, args=arguments, daemon=True)
    process.start()
    process.join(timeout=120)
    return process.exitcode


@pytest.mark.parametrize("index_type", ["IVF8,SQ8", "HNSW8"])
def test_a_build_killed_around_every_step_ends_with_the_bytes_of_an_undisturbed_one(
    source_folder: Path, tmp_path: Path, index_type: str
) -> None:
    assert run_build(source_folder, tmp_path / "undisturbed", index_type, None, False) == 0
    num_kills = 0
    # Each process gets a step or two further: it dies with the next one written but not yet named, or right after it.
    while code := run_build(source_folder, tmp_path / "killed", index_type, 2 + num_kills % 2, num_kills % 3 == 0):
        assert code == -signal.SIGKILL
        num_kills += 1
        assert num_kills < 60
    assert num_kills >= 6
    expected, found = (PublishedIndex.open(tmp_path / name) for name in ("undisturbed", "killed"))
    assert found.manifest.files == expected.manifest.files
    assert found.fingerprint == expected.fingerprint
    assert versions_of(tmp_path / "killed") == ["v0001"]
    assert not list((tmp_path / "killed").glob(".unfinished-*"))


def test_a_build_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    source_folder: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    assert run_build(source_folder, tmp_path / "undisturbed", "IVF8,SQ8", None, False) == 0
    seconds = time.monotonic() - started
    moments = sorted(random.Random(os.urandom(8)).uniform(0, seconds) for _ in range(3))
    for moment in moments:
        process = _context.Process(
            target=build_and_die, args=(source_folder, tmp_path / "killed", "IVF8,SQ8", None, False), daemon=True
        )
        process.start()
        process.join(timeout=moment)
        process.kill()
        process.join()
    assert run_build(source_folder, tmp_path / "killed", "IVF8,SQ8", None, False) == 0
    expected, found = (PublishedIndex.open(tmp_path / name).fingerprint for name in ("undisturbed", "killed"))
    assert found == expected, f"killed after {moments} seconds"


def test_the_same_build_is_reused_and_another_becomes_a_new_version(source_folder: Path, tmp_path: Path) -> None:
    source, folder = open_source_files(source_folder), tmp_path / "index"
    first = build_index(source, folder, settings_for("Flat"))
    assert build_index(source, folder, settings_for("Flat")).version == first.version == "v0001"
    assert build_index(source, folder, settings_for("Flat", seed=1)).version == "v0002"
    other = write_source(tmp_path / "other", 50)
    assert build_index(other, folder, settings_for("Flat", seed=1)).num_vectors == 50
    assert versions_of(folder) == ["v0001", "v0002", "v0003"]


def test_an_unfinished_build_is_continued_only_for_the_same_vectors(source_folder: Path, tmp_path: Path) -> None:
    source, folder = open_source_files(source_folder), tmp_path / "index"
    assert plan_build(source, folder, settings_for("Flat")).index_type.name == "Flat"
    store = folder / ".unfinished-v0001" / "version" / "vectors.npy"
    node = store.stat().st_ino
    assert plan_build(source, folder, settings_for("IVF8,SQ8")).index_type.name == "IVF8,SQ8"
    assert store.stat().st_ino == node, "the copy of the vectors does not depend on the settings"
    other = write_source(tmp_path / "other", 60, seed=5)
    index = build_index(other, folder, settings_for("Flat"))
    np.testing.assert_array_equal(index.ids(), np.sort(clustered(60, seed=5)[1]))


def test_one_process_builds_at_a_time(source_folder: Path, tmp_path: Path) -> None:
    source, folder = open_source_files(source_folder), tmp_path / "index"
    with (
        open_staging(folder, source="other", settings={}),
        pytest.raises(ResourceError, match="Another process is building"),
    ):
        build_index(source, folder, settings_for("Flat"))
    assert build_index(source, folder, settings_for("Flat")).version == "v0001"


def test_an_index_is_never_built_into_something_else(source_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="other than an index"):
        build_index(open_source_files(source_folder), tmp_path / "letters")


def test_wishes_that_cannot_be_kept_are_built_only_where_the_nearest_is_accepted(
    source_folder: Path, tmp_path: Path
) -> None:
    source, wishes = open_source_files(source_folder), settings_for("auto", ram="1KiB")
    with pytest.raises(ResourceError, match=r"cannot all be kept[\s\S]*Flat"):
        build_index(source, tmp_path / "index", wishes)
    assert not versions_of(tmp_path / "index")
    assert build_index(source, tmp_path / "index", wishes, accepts_nearest=True).num_vectors == NUM_VECTORS
    with pytest.raises(SettingsError, match="PQ4"):
        build_index(source, tmp_path / "other", settings_for("IVF8,PQ4"))
    with pytest.raises(SettingsError, match="IVF2048,Flat"):
        build_index(source, tmp_path / "other", settings_for("IVF2048,Flat"))


def test_a_full_disk_is_told_before_anything_is_written(
    source_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = NUM_VECTORS * (16 * 4 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed // 2))
    with pytest.raises(ResourceError, match=r"needs \d+ bytes .* free") as refusal:
        build_index(open_source_files(source_folder), tmp_path / "index", settings_for("IVF8,SQ8"))
    assert int(str(refusal.value).split(" needs ")[1].split()[0]) >= needed
    assert not versions_of(tmp_path / "index")


def test_a_disk_that_fills_up_on_the_way_is_named_and_the_build_goes_on_later(
    source_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = open_source_files(source_folder), tmp_path / "index"

    def is_full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", is_full)
        with pytest.raises(ResourceError, match=r"is full: .* needs \d+ bytes"):
            build_index(source, folder, settings_for("IVF8,SQ8"))
        assert not versions_of(folder)
    assert build_index(source, folder, settings_for("IVF8,SQ8")).version == "v0001"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_faiss_says_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    index = load_faiss().IndexFlatIP(4096)
    index.add(np.zeros((100, 4096), np.float32))
    with (
        pytest.raises(ResourceError, match="needs 17 bytes"),
        full_disk_explained(tmp_path, 17, purpose="a test"),
    ):
        write_faiss_index(index, Path("/dev/full"))


def filled_index(codec: str = "SQ8", *, shift: int = 0) -> tuple[Any, ndarray, ndarray, ndarray]:
    """An IVF index whose ids are shifted against their vectors."""
    vectors, ids = clustered(600)
    index = create_untrained(IndexType.parse(f"IVF8,{codec}"), 16, seed=0)
    index.train(vectors)
    index.add_with_ids(vectors, np.roll(ids, shift))
    _, assigned = index.quantizer.search(vectors, 1)
    return index, vectors, ids, np.ascontiguousarray(assigned[:, 0])


@pytest.mark.parametrize("codec", ["Flat", "SQfp16", "SQ8", "RaBitQ"])
def test_wrong_ids_are_found_right_after_they_were_added(codec: str) -> None:
    require_rows_under_their_ids(*filled_index(codec))
    with pytest.raises(DataError, match="nothing is built"):
        require_rows_under_their_ids(*filled_index(codec, shift=1))


@pytest.mark.usefixtures("small_parts")
def test_an_index_that_answers_with_wrong_ids_is_not_published(
    source_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "require_rows_under_their_ids", lambda *_: None)
    monkeypatch.setattr(partitions, "ids_of", lambda store, rows: np.roll(store.ids[rows.start : rows.stop], 1))
    with pytest.raises(DataError, match="approximate search does not find"):
        build_index(open_source_files(source_folder), tmp_path / "index", settings_for("IVF8,SQ8"))
    assert not versions_of(tmp_path / "index")


def test_more_copies_than_places_are_no_wrong_ids() -> None:
    from indexing.searching.exact import ExactSearcher

    vectors = np.repeat(clustered(2)[0], 40, axis=0)
    store = VectorStore(vectors, np.arange(80))
    require_ids_found(ExactSearcher(store), IndexType.parse("Flat"), store, np.array([39, 79]))


class ListedSource:
    """A `VectorSource` from arrays in memory, for what files cannot hold."""

    def __init__(self, vectors: ndarray, ids: ndarray, *, promised: int | None = None) -> None:
        self._vectors, self._ids = vectors, ids
        self.num_vectors, self.dim = promised or len(vectors), vectors.shape[1]
        self.fingerprint, self.parents, self.details = "listed", {}, {}
        self.encoder_folder = self.shards_folder = None

    def ids(self) -> ndarray:
        return self._ids

    def blocks(self) -> Any:
        yield VectorBlock(self._vectors, self._ids[: len(self._vectors)])

    def metadata_of(self, ids: ndarray) -> Any:
        return metadata_for(ids).select([])

    def check(self) -> None:
        pass


@pytest.mark.parametrize(
    ("ids", "promised", "message"),
    [
        ([1, 2, 2], None, "unique, found 2"),
        ([-1, 2, 3], None, "negative, found -1"),
        ([1, 2], None, "3 vectors, but 2 ids"),
        ([1, 2, 3], 4, "4 vectors, but 3 ids"),
        ([1, 2, 3, 4], 4, "promised 4 vectors, but brought 3"),
    ],
)
def test_unusable_sources_are_refused(ids: list[int], promised: int | None, message: str, tmp_path: Path) -> None:
    source = ListedSource(clustered(3)[0], np.array(ids), promised=promised)
    with pytest.raises(DataError, match=message):
        build_index(source, tmp_path / "index", settings_for("Flat"))


def test_a_source_that_mixes_up_its_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = clustered(3)
    source = ListedSource(vectors, ids)
    monkeypatch.setattr(source, "blocks", lambda: iter([VectorBlock(vectors, np.roll(ids, 1))]))
    with pytest.raises(DataError, match="other ids than it listed"):
        build_index(source, tmp_path / "index", settings_for("Flat"))


def test_halves_stay_halves_and_metadata_may_be_absent(tmp_path: Path) -> None:
    vectors, ids = clustered(100)
    index = build_index(ListedSource(vectors.astype(np.float16), ids), tmp_path / "index", settings_for("Flat"))
    assert index.store.vectors.dtype == np.float16
    np.testing.assert_array_equal(index.vectors_of(ids), vectors.astype(np.float16).astype(np.float32))
    assert index.metadata_of(ids[:2]) == [{}, {}]
    with pytest.raises(KeyError):
        index.metadata_of(np.array([17]))


def test_k_means_resumes_to_the_same_centroids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, _ = clustered(800)
    whole = train_centroids(sample, 8, seed=3)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    monkeypatch.setattr("indexing.building.training.KMEANS_ITERATIONS", 4)
    train_centroids(sample, 8, seed=3, checkpoint=tmp_path / "centroids.npz")
    monkeypatch.undo()
    np.testing.assert_array_equal(train_centroids(sample, 8, seed=3, checkpoint=tmp_path / "centroids.npz"), whole)
    shares = np.bincount(np.argmax(sample @ whole.T, axis=1), minlength=8)
    assert (shares > 0).all()


def test_gpus_are_used_where_faiss_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(create_assigner(16)).__name__ in ("IndexFlatIP", "GpuIndexFlatIP")
    fake = SimpleNamespace(
        get_num_gpus=lambda: 2,
        StandardGpuResources=lambda: "resources",
        GpuIndexFlatConfig=lambda: SimpleNamespace(device=0),
        GpuIndexFlatIP=lambda resources, dim, config: (resources, dim, config.device),
        IndexFlatIP=lambda dim: ("cpu", dim),
    )
    monkeypatch.setattr("indexing.building.gpu.load_faiss", lambda: fake)
    assert create_assigner(16, device=3) == ("resources", 16, 1)
    fake.get_num_gpus = lambda: 0
    assert create_assigner(16) == ("cpu", 16)
    del fake.StandardGpuResources
    assert num_gpus() == 0


@pytest.mark.gpu
def test_a_gpu_assigns_as_the_cpu_does() -> None:
    if not num_gpus():
        pytest.skip("this faiss cannot use GPUs")
    vectors, _ = clustered(20_000, 64)
    centroids = train_centroids(vectors, 64, seed=0)
    assigner = create_assigner(64)
    assigner.add(centroids)
    _, found = assigner.search(vectors, 1)
    scores = vectors @ centroids.T
    best = scores.max(axis=1)
    # Only centroids that are equally near within float32 rounding may be confused.
    np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1)[:, 0], best, atol=1e-5)
