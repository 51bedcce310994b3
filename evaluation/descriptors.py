"""Anybody's vectors or rankings, judged by a benchmark: what `lookalike evaluate descriptors` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.decode import cropped
from data_pipelines.sources import pixel_box
from evaluation.benchmarks import BENCHMARKS, ClassProtocol, LandmarkBenchmark
from evaluation.classes.mutual_information import normalized_mutual_information
from evaluation.classes.protocols import leave_one_out, query_gallery, random_gallery
from evaluation.galleries import FolderShelf, Illustrations
from evaluation.outputs import Outputs, Shown, conclude
from evaluation.pictures_of_shards import landmark_pictures
from evaluation.protocols import CLASS_PROTOCOLS, LANDMARK_PROTOCOL, require_official_size
from evaluation.record import Role, record_of_files
from evaluation.result import Result, Section, result_tree
from evaluation.revisited.evaluate import evaluate_descriptors
from evaluation.revisited.ground_truth import GroundTruth, load_ground_truth
from evaluation.revisited.nearest import nearest
from evaluation.revisited.rank_counts import TieRule
from evaluation.revisited.rankings import evaluate_rankings
from evaluation.validators import (
    duplicates,
    effect_of_duplicates,
    has_copy,
    has_twin,
    impossible_values,
    norms,
    precision,
    row_hashes,
    share_of_copies,
)
from evaluation.vector_files import (
    load_ids,
    load_labels,
    load_rankings,
    load_vector_parts,
    load_vectors,
    provenance,
)
from lookalike.artifacts import file_sha256
from lookalike.errors import DataError
from lookalike.world import World

_NUM_NEAREST = 100
# Looking for copies reads and hashes every row.
_MOST_ROWS_HASHED = 200_000


@dataclass(frozen=True, slots=True)
class LandmarkFiles:
    """Descriptors of Oxford or Paris, or somebody's rankings of its pictures."""

    ground_truth: Path
    queries: Path | None = None
    database: Path | None = None
    distractors: tuple[Path, ...] = ()
    rankings: Path | None = None  # .npy [queries, depth] of rows, -1 where there are no more; in place of descriptors
    num_distractors: int = 0  # of the rankings
    pictures: Path | None = None  # folder of the official jpg files, for the report


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """Vectors with a class each; without a database every row searches the other rows."""

    queries: Path
    query_labels: Path
    database: Path | None = None
    database_labels: Path | None = None
    query_ids: Path | None = None  # whole numbers; an id in both files is the same picture
    database_ids: Path | None = None


def evaluate_landmark_files(
    benchmark: Literal["roxford5k", "rparis6k"],
    files: LandmarkFiles,
    outputs: Outputs,
    *,
    ties: TieRule = "index",
    world: World = World(),
) -> tuple[dict[str, Any], list[str]]:
    """The official numbers with all values per query, as JSON and as lines of text; nothing on ranks but the first.

    Raises:
        DataError: a file cannot be read, or counts, dimensions or values do not fit.
    """
    outputs.check()
    if files.pictures and not files.pictures.is_dir():
        raise DataError(f"{files.pictures} is no folder of pictures.")
    truth = load_ground_truth(files.ground_truth)
    official = BENCHMARKS[benchmark]
    assert isinstance(official, LandmarkBenchmark)
    require_official_size(truth, official, files.ground_truth)
    if files.rankings:
        result = _judge_rankings(benchmark, files, truth)
        pictures: Callable[[], Illustrations] = Illustrations
    else:
        assert files.queries is not None
        assert files.database is not None
        queries, database = load_vectors(files.queries, role="queries"), load_vectors(files.database)
        parts = {path: load_vector_parts(path) for path in files.distractors}
        others = [part for of_path in parts.values() for part in of_path]
        outcome = evaluate_descriptors(
            queries,
            database,
            truth,
            distractors=others,
            ties=ties,
            progress_file=_progress_file(outputs),
            world=world,
        )
        record = record_of_files(
            benchmark,
            LANDMARK_PROTOCOL,
            {
                "queries": [provenance(files.queries, [queries])],
                "gallery": [provenance(files.database, [database])],
                "distractors": [provenance(path, own) for path, own in parts.items()],
            },
            ground_truth=truth.sha256,
            ties=ties,
            expected={"queries": len(truth.query_names), "gallery": official.num_database},
        )
        warnings = [
            *norms("queries", queries),
            *norms("database", database),
            *(warning for path, own in parts.items() for warning in norms(path.name, *own)),
            *precision("database", database),
            *duplicates("database", row_hashes(database)),
        ]
        sections: dict[str, Section] = {str(name): section for name, section in outcome.sections.items()}
        result = Result(benchmark, sections, record.as_json(), warnings, outcome.curve)

        def failures() -> Illustrations:
            hits = nearest(queries, database, others, k=_NUM_NEAREST)
            return landmark_pictures(
                sections,
                truth,
                hits,
                gallery_shelf=FolderShelf(truth.database_names, files.pictures),
                query_shelf=_query_shelf(truth, files.pictures),
            )

        pictures = failures
    result = replace(result, warnings=[*result.warnings, *impossible_values(result_tree(result), truth)])
    if not world.is_first:
        return {}, []
    _, lines = conclude(
        result, outputs, name="these descriptors", title=f"Retrieval quality: {benchmark}", shown=Shown(pictures)
    )
    return result_tree(result), lines


def _judge_rankings(benchmark: str, files: LandmarkFiles, truth: GroundTruth) -> Result:
    assert files.rankings is not None
    ranked = load_rankings(files.rankings)
    outcome = evaluate_rankings(ranked, truth, num_distractors=files.num_distractors)
    record = record_of_files(
        benchmark, LANDMARK_PROTOCOL, {}, ground_truth=truth.sha256, ties="as the rankings order them"
    )
    tree = {**record.as_json(), "num_distractors": files.num_distractors, "rankings": files.rankings.name}
    return Result(benchmark, {str(name): section for name, section in outcome.sections.items()}, tree)


def evaluate_label_files(
    files: LabelFiles,
    outputs: Outputs,
    *,
    protocol: ClassProtocol,
    ks: Sequence[int],
    ties: TieRule = "index",
    num_seeds: int = 10,
    with_nmi: bool = False,
    world: World = World(),
) -> tuple[dict[str, Any], list[str]]:
    """Hit rates, recall, MAP@R and more of vectors with one class each; nothing on ranks but the first.

    Raises:
        DataError: a file cannot be read, or counts, dimensions or values do not fit.
    """
    outputs.check()
    vectors, labels = load_vectors(files.queries, role="queries"), load_labels(files.query_labels)
    ids = _ids(files.query_ids, len(vectors), first=0)
    roles: dict[Role, list[dict[str, Any]]] = {"queries": [provenance(files.queries, [vectors])]}
    warnings = [*norms("queries", vectors), *precision("queries", vectors)]
    if protocol == "query_gallery":
        assert files.database is not None
        assert files.database_labels is not None
        gallery, gallery_labels = load_vectors(files.database), load_labels(files.database_labels)
        # Without ids no picture of one file is one of the other.
        gallery_ids = _ids(files.database_ids, len(gallery), first=int(ids.max(initial=-1)) + 1)
        section = query_gallery(
            vectors, ids, labels, gallery, gallery_ids, gallery_labels, ks=ks, ties=ties, world=world
        )
        roles["gallery"] = [provenance(files.database, [gallery])]
        warnings += norms("database", gallery)
        if max(len(vectors), len(gallery)) <= _MOST_ROWS_HASHED and not files.query_ids:
            hashes, metric = row_hashes(gallery), f"hit_rate@{ks[0]}"
            is_copied = has_copy(row_hashes(vectors), hashes)
            warnings += effect_of_duplicates(
                metric, section.per_query[metric], is_copied, share=float(is_copied.mean())
            )
    elif protocol == "leave_one_out":
        section = leave_one_out(vectors, ids, labels, ks=ks, ties=ties, world=world)
        if len(vectors) <= _MOST_ROWS_HASHED:
            warnings += _copies(section, f"hit_rate@{ks[0]}", vectors, ids)
    else:
        section = random_gallery(vectors, ids, labels, ks=ks, ties=ties, num_seeds=num_seeds, world=world)
    if with_nmi:
        nmi = normalized_mutual_information(vectors, ids, labels)
        section = replace(section, facts={**section.facts, "nmi": 100 * nmi})
    record = record_of_files(
        "labels", CLASS_PROTOCOLS[protocol], roles, ground_truth=file_sha256(files.query_labels), ties=ties
    )
    result = Result("labels", {protocol: section}, record.as_json(), warnings)
    if not world.is_first:
        return {}, []
    _, lines = conclude(result, outputs, name="these vectors", title="Retrieval quality")
    return result_tree(result), lines


def _copies(section: Section, metric: str, vectors: ndarray, ids: Int64[ndarray, "rows"]) -> list[str]:
    hashes, order = row_hashes(vectors), np.argsort(ids)
    places = order[np.searchsorted(ids, np.array(section.query_names, np.int64), sorter=order)]
    return [
        *duplicates("queries", hashes),
        *effect_of_duplicates(
            metric, section.per_query[metric], has_twin(hashes)[places], share=share_of_copies(hashes)
        ),
    ]


def _ids(file: Path | None, count: int, *, first: int) -> Int64[ndarray, "rows"]:
    return load_ids(file) if file else np.arange(first, first + count)


def _query_shelf(truth: GroundTruth, folder: Path | None) -> FolderShelf:
    return FolderShelf(
        truth.query_names,
        folder,
        crop=lambda number, image: cropped(image, pixel_box(truth.query_boxes[number].tolist())),
    )


def _progress_file(outputs: Outputs) -> Path | None:
    """Beside the result, so that the same command finds it again."""
    target = outputs.json_file or outputs.report
    return target.with_name(f"{target.name}.progress.npz") if target else None
