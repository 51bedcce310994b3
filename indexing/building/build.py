"""A source of vectors -> a published version: stored, planned, trained, filled, measured, verified."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from indexing.building.graph import measured_folder, write_graph
from indexing.building.partitions import is_merged, merge_partitions, row_blocks, write_partitions
from indexing.building.ranks import first_works, work_together
from indexing.building.staging import (
    Staging,
    finish_publication,
    full_disk_explained,
    open_staging,
    unfinished_version,
)
from indexing.building.store_writer import write_store
from indexing.building.training import training_points, write_trained_index
from indexing.building.verification import canary_ids, require_ids_found
from indexing.index_types import IndexType
from indexing.planning.measuring import measure_index
from indexing.planning.plan import Plan
from indexing.planning.planner import plan_index
from indexing.planning.report import plan_lines
from indexing.published_index import ENCODER_FOLDER, INDEX_KIND, INDEX_VERSION, PublishedIndex, open_searcher
from indexing.searching.recall_curve import MeasuredDepth, RecallCurve, measured_depths
from indexing.settings import IndexSettings
from indexing.vector_source import VectorSource
from indexing.vector_store import VectorStore
from indexing.versions import becoming_current, next_version, require_fit_for_changes, require_index_folder
from lookalike.artifacts import Manifest, link_or_copy, locations_of, versions, write_manifest
from lookalike.errors import ArtifactError, ResourceError
from lookalike.native_libraries import load_faiss, num_cores
from lookalike.records import Effort
from lookalike.settings import dump_settings
from lookalike.world import World

logger = logging.getLogger(__name__)

_PLAN_NAME = "plan.json"
_CURVE_NAME = "curve.json"
_DEEP = 100  # recall is measured for lists of this length, too
_ROWS_PER_NORM = 16_384


def build_index(
    source: VectorSource,
    folder: Path,
    settings: IndexSettings = IndexSettings(),
    *,
    accepts_nearest: bool = False,
    world: World = World(),
) -> PublishedIndex:
    """Builds a new version under `folder`, measures and verifies it, and makes it the current one.

    Run again after an interruption, it goes on where it stopped and ends with the same bytes. A version made from the
    same source and settings that is current already is kept as it is. Every rank of `world` calls this alike.

    Args:
        accepts_nearest: Build the nearest possible index where the wishes in `settings` cannot all be kept.

    Raises:
        ArtifactError: the source has changed since it was made, or `folder` holds something else, or changes that the
            version would not go with.
        DataError: vectors are unusable, or the finished index does not find known vectors under their ids.
        ResourceError: the wishes cannot be kept, the disk has no room, or another process builds in `folder`.
    """
    require_index_folder(folder)
    identity = _identity(source, settings)
    first_works(lambda: finish_publication(folder, **identity), world)
    existing = _current_if_same(source, folder, settings)
    if existing is not None:
        return existing
    require_fit_for_changes(folder, {"dim": source.dim, **source.details}, version=next_version(folder))
    clock = _StageClock()
    # The lock is held by the first rank from the first stage to the last.
    with full_disk_explained(folder, 0, purpose="building"), ExitStack() as staging_lock:

        def prepare() -> None:
            staging = staging_lock.enter_context(open_staging(folder, **identity))
            plan = _prepared_plan(source, staging, settings, clock)
            if not (plan.is_reachable or accepts_nearest):
                raise ResourceError("\n".join(["these wishes cannot all be kept.", *plan_lines(plan)]))
            for line in plan_lines(plan):
                logger.info(line)
            _train(plan, staging, settings, clock)

        first_works(prepare, world)
        work_together(lambda: _add_vectors(folder, clock, world=world), world)
        first_works(lambda: _finish(source, unfinished_version(folder), settings, clock), world)
    return PublishedIndex.open(folder)


def plan_build(source: VectorSource, folder: Path, settings: IndexSettings = IndexSettings()) -> Plan:
    """What `build_index` would build. The vectors that it had to read for that are kept for the build that follows."""
    require_index_folder(folder)
    with open_staging(folder, **_identity(source, settings)) as staging:
        return _prepared_plan(source, staging, settings, _StageClock())


def _identity(source: VectorSource, settings: IndexSettings) -> dict[str, Any]:
    """What an unfinished version must share with the build that continues it."""
    # Another faiss may draw other random numbers, and half of the stages would be the one's, half the other's.
    makers = {name: version for name, version in versions().items() if name.startswith("faiss")}
    settings_tree = {"format": INDEX_VERSION, "settings": dump_settings(settings), "made_by": makers}
    return {"source": source.fingerprint, "settings": settings_tree}


class _StageClock:
    """Seconds that each stage took in this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)


def _prepared_plan(source: VectorSource, staging: Staging, settings: IndexSettings, clock: _StageClock) -> Plan:
    with clock.time("store"):
        source.check()
        write_store(source, staging)
    with clock.time("plan"):
        if (tree := staging.read(_PLAN_NAME)) is None:
            store = VectorStore.open(staging.version_folder)
            tree = plan_index(store, settings).to_tree()
            staging.write(_PLAN_NAME, tree)
    return Plan.from_tree(tree)


def _train(plan: Plan, staging: Staging, settings: IndexSettings, clock: _StageClock) -> None:
    index_type = plan.index_type
    if index_type.family == "flat":
        return
    store = VectorStore.open(staging.version_folder)
    with _full_disk_explained(index_type, store, staging), clock.time("train"):
        write_trained_index(store, index_type, staging, seed=settings.seed)


def _add_vectors(folder: Path, clock: _StageClock, *, world: World) -> None:
    """What several ranks share: independent partial indexes."""
    load_faiss(num_threads=world.share_of_cores(num_cores()))
    staging = unfinished_version(folder)
    index_type = Plan.from_tree(staging.read(_PLAN_NAME)).index_type
    if index_type.family != "ivf" or is_merged(staging):
        return
    store = VectorStore.open(staging.version_folder)
    with _full_disk_explained(index_type, store, staging), clock.time("add"):
        write_partitions(store, staging, world=world)


def _finish(source: VectorSource, staging: Staging, settings: IndexSettings, clock: _StageClock) -> None:
    plan = Plan.from_tree(staging.read(_PLAN_NAME))
    store = VectorStore.open(staging.version_folder)
    with _full_disk_explained(plan.index_type, store, staging):
        if plan.index_type.family == "ivf":
            with clock.time("merge"):
                merge_partitions(store, staging)
        elif plan.index_type.family == "hnsw":
            with clock.time("graph"):
                write_graph(store, staging, seed=settings.seed)
        with clock.time("measure"):
            measured = _measured(plan.index_type, store, staging, settings)
        recall = {
            "measured_depth": settings.at,
            "recall_curve": measured["recall_curve"],
            "default_effort": measured["default_effort"],
            "deeper": measured["deeper"],
        }
        with clock.time("verify"):
            canaries = canary_ids(store, seed=settings.seed)
            searcher = open_searcher(staging.version_folder, plan.index_type, store, measured_depths(recall))
            require_ids_found(searcher, plan.index_type, store, canaries)
        details = {
            "dim": store.dim,
            "num_vectors": store.num_vectors,
            "metric": "inner product",
            "type": plan.index_type.name,
            "target_recall": settings.recall,
            **recall,
            "norms": _norms(store),
            "canary_ids": canaries.tolist(),
            "source_fingerprint": source.fingerprint,
            **source.details,
        }
        measurements = {
            "measured": measured["measurements"],
            "plan": {"table": plan.to_tree()["table"], **plan.measurements},
            "seconds": clock.seconds,  # of this process: after an interruption, of its last part
        }
        _copy_encoder(source, staging)
        target = staging.folder.with_name(staging.version)
        shards = source.shards_folder
        locations = locations_of("shards", shards, artifact=target) if shards else {}
        manifest = Manifest(INDEX_KIND, INDEX_VERSION, source.parents, details, dump_settings(settings), locations)
        write_manifest(staging.version_folder, replace(manifest, measurements=measurements))
        with becoming_current(target.parent, details, version=staging.version):
            staging.publish()


def _measured(index_type: IndexType, store: VectorStore, staging: Staging, settings: IndexSettings) -> dict[str, Any]:
    """Recall curves, default efforts and timings; `Flat` has nothing to measure, as it always finds all."""
    if (tree := staging.read(_CURVE_NAME)) is not None:
        return dict(tree)
    first = MeasuredDepth(settings.at, RecallCurve(), Effort())
    deeper: list[MeasuredDepth] = []
    measurements: dict[str, Any] = {}
    if index_type.family != "flat":
        is_graph = index_type.family == "hnsw"
        measured = measured_folder(staging) if is_graph else staging.version_folder
        searcher = open_searcher(measured, index_type, store, [first])
        curve, effort, measurements = measure_index(searcher, store, settings)
        first = MeasuredDepth(settings.at, curve, effort)
        if settings.at < _DEEP < store.num_vectors // 2:
            # Lists of ten say nothing about lists of a hundred: far neighbours lie scattered over more partitions.
            curve, effort, timings = measure_index(searcher, store, settings.model_copy(update={"at": _DEEP}))
            deeper.append(MeasuredDepth(_DEEP, curve, effort))
            measurements = {**measurements, "deeper": [timings]}
    tree = {
        **first.to_tree(),
        "deeper": [deep.to_tree() for deep in deeper],
        "measurements": measurements,
    }
    staging.write(_CURVE_NAME, tree)
    return tree


def _norms(store: VectorStore) -> dict[str, float]:
    """Least, mean and largest length of the stored vectors, rounded beyond what the order of sums could change."""
    least, total, largest = np.inf, 0.0, 0.0
    for start in range(0, store.num_vectors, _ROWS_PER_NORM):
        norms = np.linalg.norm(np.asarray(store.vectors[start : start + _ROWS_PER_NORM], np.float32), axis=1)
        least, largest = min(least, float(norms.min())), max(largest, float(norms.max()))
        total += float(norms.sum(dtype=np.float64))
    return {"least": round(least, 5), "mean": round(total / store.num_vectors, 5), "largest": round(largest, 5)}


def _copy_encoder(source: VectorSource, staging: Staging) -> None:
    target = staging.version_folder / ENCODER_FOLDER
    if source.encoder_folder is None:
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        source.encoder_folder, target, copy_function=lambda file, copy: link_or_copy(Path(file), Path(copy))
    )


def _full_disk_explained(index_type: IndexType, store: VectorStore, staging: Staging) -> AbstractContextManager[None]:
    """For what remains to be written: the index itself, and beside it its parts or checkpoint, and the sample."""
    entries = store.num_vectors * (index_type.code_bytes(store.dim) + 8)
    centroids = 4 * store.dim * index_type.num_partitions
    needed = 0
    if index_type.family == "ivf":
        sample = 4 * store.dim * min(store.num_vectors, training_points(index_type))
        needed = 2 * entries + (len(row_blocks(store)) + 3) * centroids + sample
    elif index_type.family == "hnsw":
        needed = 3 * (entries + store.num_vectors * (8 * index_type.num_links + 16))
    needed = max(0, needed - staging.bytes_beside_store())
    return full_disk_explained(staging.folder, needed, purpose=f"building {index_type.name}")


def _current_if_same(source: VectorSource, folder: Path, settings: IndexSettings) -> PublishedIndex | None:
    try:
        current = PublishedIndex.open(folder)
    except ArtifactError:
        return None
    is_same_source = current.manifest.details["source_fingerprint"] == source.fingerprint
    is_same = is_same_source and current.manifest.settings == dump_settings(settings)
    return current if is_same else None
