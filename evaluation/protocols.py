"""Sentences that say how each protocol judges, and small steps that offline and live evaluation share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from evaluation.benchmarks import ClassBenchmark, ClassProtocol, LandmarkBenchmark
from evaluation.gldv2.retrieval import RetrievalScores
from evaluation.result import Section
from evaluation.revisited.ground_truth import GroundTruth
from lookalike.errors import DataError

CLASS_PROTOCOLS: dict[ClassProtocol, str] = {
    "leave_one_out": "every picture searches all others; found are those of its class",
    "random_gallery": "one random picture of each class is the gallery, all others search it; repeated with seeds",
    "query_gallery": "given queries search a given gallery; found are pictures of their class",
}


def class_protocol(sections: Sequence[str], benchmark: ClassBenchmark) -> str:
    """What was done, with which splits."""
    told = "; ".join(text for name, text in CLASS_PROTOCOLS.items() if name in sections)
    queries = f", queries: {benchmark.query_split}" if benchmark.query_split else ""
    return f"{told} (gallery: {benchmark.gallery_split or 'all splits'}{queries})"


LANDMARK_PROTOCOL = (
    "queries search the database; junk is taken out of each ranking; average precision by the trapezoid rule; "
    "easy, medium and hard count what their names say as found"
)
RETRIEVAL_PROTOCOL = "queries search the index; average precision of the first 100, divided by min(relevant, 100)"
CROP = "what is inside the official box, its corners rounded halves to even, cut from the upright picture"
NO_CROP = "whole pictures"


def require_official_size(truth: GroundTruth, benchmark: LandmarkBenchmark, file: Path) -> None:
    """Raises DataError where a ground truth is that of another benchmark."""
    if len(truth.database_names) != benchmark.num_database:
        raise DataError(
            f"{file} lists {len(truth.database_names)} pictures, {benchmark.name} has {benchmark.num_database}."
        )


def places_in_truth(
    ids: Int64[ndarray, "queries depth"], database_ids: Int64[ndarray, "database"], *, num_database: int
) -> Int64[ndarray, "queries depth"]:
    """Ids of hits as rows of the ground truth: other pictures are distractors, numbered after the database."""
    order = np.argsort(database_ids)
    places = np.minimum(np.searchsorted(database_ids, ids, sorter=order), num_database - 1)
    rows = order[places]
    is_known = database_ids[rows] == ids
    others = np.unique(ids[~is_known & (ids >= 0)])
    as_distractors = num_database + np.searchsorted(others, ids)
    return np.where(ids < 0, -1, np.where(is_known, rows, as_distractors)).astype(np.int64)


def retrieval_sections(scores: RetrievalScores, facts: dict[str, Any]) -> dict[str, Section]:
    """A section for each part of the solution that is scored."""
    sections = {}
    for usage in ("Public", "Private"):
        if usage in scores.usages:
            own = scores.of_usage(usage)
            sections[usage.lower()] = Section(
                own.query_names,
                np.arange(len(own.query_names)),
                {"map@100": own.average_precisions},
                facts={**facts, "num_missing_queries": own.num_missing_queries},
            )
    return sections
