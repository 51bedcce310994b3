"""Index building on several processes: the bytes of one, and nobody waits for a process that failed."""

import time
from pathlib import Path

import pytest

from indexing.building import partitions
from indexing.building.build import build_index
from indexing.building.ranks import OtherRankFailed, first_works, work_together
from indexing.building.staging import open_staging
from indexing.planning import calibration, planner
from indexing.settings import IndexSettings
from lookalike.errors import ResourceError
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from tests.unit.indexing.clustered_vectors import open_source_files, write_source

SETTINGS = IndexSettings(type="IVF8,SQ8", recall=0.5, num_measured_queries=10)


def build(world: World, source_folder: Path, folder: Path) -> tuple[str, dict, list[int]]:
    partitions.BYTES_PER_BLOCK = 300 * 16 * 4
    planner.measure_rates = calibration.nominal_rates
    added: list[int] = []
    verify = partitions.require_rows_under_their_ids

    def counted(index, vectors, ids, assigned):  # type: ignore[no-untyped-def]
        added.append(len(ids))
        verify(index, vectors, ids, assigned)

    partitions.require_rows_under_their_ids = counted
    index = build_index(open_source_files(source_folder), folder, SETTINGS, world=world)
    return index.fingerprint, dict(index.manifest.files), added


def build_locked(world: World, source_folder: Path, folder: Path) -> str:
    try:
        build(world, source_folder, folder)
    except (ResourceError, OtherRankFailed) as error:
        return type(error).__name__
    return "built"


def work_unevenly(world: World) -> list[float]:
    started = time.monotonic()
    first_works(lambda: time.sleep(2.5), world)
    work_together(lambda: time.sleep(1.5 * world.rank), world)
    return [time.monotonic() - started]


def test_ranks_build_the_very_bytes_of_one_process(tmp_path: Path) -> None:
    write_source(tmp_path / "source", 1500)
    [alone] = run_on_ranks(build, 1, tmp_path / "source", tmp_path / "alone")
    on_two = run_on_ranks(build, 2, tmp_path / "source", tmp_path / "two")
    assert [result[:2] for result in on_two] == [alone[:2], alone[:2]]
    assert alone[2] == [300] * 5
    assert [result[2] for result in on_two] == [[300] * 3, [300] * 2], "both ranks add vectors"


def test_a_failure_of_the_first_rank_ends_the_others(tmp_path: Path) -> None:
    write_source(tmp_path / "source", 100)
    with open_staging(tmp_path / "index", source="other", settings={}):
        outcomes = run_on_ranks(build_locked, 2, tmp_path / "source", tmp_path / "index")
    assert outcomes == ["ResourceError", "OtherRankFailed"]


def test_ranks_wait_for_one_another_beyond_a_heartbeat() -> None:
    for [seconds] in run_on_ranks(work_unevenly, 2):
        assert seconds == pytest.approx(4.5, abs=2.5)
        assert seconds >= 4
