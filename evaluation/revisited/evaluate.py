"""Descriptors -> the official numbers of revisited Oxford and Paris, exact with any number of distractors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray

from evaluation.result import CurvePoint, Section, mean_of_known
from evaluation.revisited.distractors import VectorList, count_distractors, num_blocks, score_blocks
from evaluation.revisited.ground_truth import SETUPS, GroundTruth, Setup, landmark_clusters
from evaluation.revisited.rank_counts import RankCounts, TieRule
from lookalike.errors import DataError
from lookalike.ranking_metrics import (
    RECALL_LEVELS,
    landmark_metrics,
    measure,
    precision_at_recall,
    trapezoid_average_precision,
)
from lookalike.world import World

PRECISION_KS = (1, 5, 10)


@dataclass(frozen=True)
class RevisitedOutcome:
    """Values of every query in every setup, by the metrics of `landmark_metrics`, and mAP as distractors are added."""

    sections: Mapping[Setup, Section]
    num_distractors: int
    curve: tuple[CurvePoint, ...] = ()


def evaluate_descriptors(
    queries: Float[ndarray, "queries dim"],
    database: Float[ndarray, "database database_dim"],
    truth: GroundTruth,
    *,
    distractors: Sequence[Float[ndarray, "_ _"]] = (),
    ties: TieRule = "index",
    curve_at: Sequence[int] | None = None,
    progress_file: Path | None = None,
    world: World = World(),
) -> RevisitedOutcome:
    """Scores by inner product in float32, counts ranks in one pass, and computes all setups.

    Several ranks count a share of the distractors each, and all return the same outcome, that of one process.

    Args:
        queries: In the order of the ground truth; of the cropped query pictures.
        database: In the order of the ground truth.
        distractors: May be memory-mapped, of any float type; read block by block, as one list.
        ties: Whether unlabelled pictures of equal score stand before or behind; the gap is reported in percent.
        curve_at: Numbers of distractors, first ones first, for which mAP is told as well, beside none and all; where
            None 10,000, 20,000, 50,000 and so on. They cost nothing and change nothing.
        progress_file: Counts are kept there now and then, and a rerun continues from them.

    Raises:
        DataError: counts, dimensions or values do not fit; the message says which.
    """
    _require_shapes(queries, database, truth, distractors)
    own_queries = _float32(queries)
    is_finite = np.isfinite(own_queries).all(axis=1)
    if not is_finite.all():
        raise DataError(f"row {int(np.argmin(is_finite))} of the queries' descriptors holds NaN or infinity.")
    others = VectorList(distractors)
    points = curve_points(len(others), curve_at)
    try:
        scores = _scores_of_all(own_queries, VectorList([database]))
        counts = RankCounts.of_database(scores, truth.labels, num_parts=len(points) - 1)
    except ValueError as error:
        raise DataError(f"descriptors of {len(database)} database pictures: {error}.") from error
    count_distractors(counts, own_queries, others, points=points, world=world, progress_file=progress_file)
    return summarise_counts(counts, truth, ties=ties, points=points)


def curve_points(num_distractors: int, asked: Sequence[int] | None = None) -> list[int]:
    """0, those asked for that lie below the number of distractors, and that number.

    Where None are asked for, 1, 2 and 5 times the powers of ten from 10,000 on.
    """
    if asked is None:
        asked = [factor * 10**power for power in range(4, len(str(num_distractors))) for factor in (1, 2, 5)]
    return sorted({0, num_distractors, *(point for point in asked if 0 < point < num_distractors)})


def summarise_counts(
    counts: RankCounts, truth: GroundTruth, *, ties: TieRule, points: Sequence[int] = ()
) -> RevisitedOutcome:
    """The metrics of counted ranks.

    Args:
        points: Where the parts of the distractors begin and end; gives the curve.
    """
    clusters = landmark_clusters(truth)
    sections: dict[Setup, Section] = {}
    for setup in SETUPS:
        positions = counts.positions(truth.labels, setup, ties=ties)
        values = measure(landmark_metrics(PRECISION_KS), positions)
        optimistic, pessimistic = (_map(counts, truth, setup, rule, None) for rule in ("optimistic", "pessimistic"))
        curves = [precision_at_recall(own, RECALL_LEVELS) for own in positions if len(own)]
        facts = {
            "tie_gap": 100 * (optimistic - pessimistic),
            "precision_at_recall": (100 * np.mean(curves, axis=0)).tolist() if curves else [],
        }
        sections[setup] = Section(truth.query_names, clusters, values, facts=facts)
    curve = [
        CurvePoint(point, {setup: _map(counts, truth, setup, ties, number) for setup in SETUPS})
        for number, point in enumerate(points)
    ]
    return RevisitedOutcome(sections, counts.num_distractors, tuple(curve))


def _map(counts: RankCounts, truth: GroundTruth, setup: Setup, ties: TieRule, num_parts: int | None) -> float:
    positions = counts.positions(truth.labels, setup, ties=ties, num_parts=num_parts)
    return mean_of_known(measure({"map": trapezoid_average_precision}, positions)["map"])


def _scores_of_all(
    queries: Float32[ndarray, "queries dim"], vectors: VectorList
) -> Float32[ndarray, "queries database"]:
    blocks = [scores for _, scores in score_blocks(queries, vectors, range(num_blocks(vectors)))]
    return np.concatenate([np.zeros((len(queries), 0), np.float32), *blocks], axis=1)


def _require_shapes(queries: ndarray, database: ndarray, truth: GroundTruth, distractors: Sequence[ndarray]) -> None:
    if len(queries) != len(truth.query_names):
        raise DataError(f"{len(queries)} query descriptors, the ground truth has {len(truth.query_names)} queries.")
    if len(database) != len(truth.database_names):
        raise DataError(
            f"{len(database)} database descriptors, the ground truth has {len(truth.database_names)} pictures. "
            "Give them in the ground truth's order, without the queries."
        )
    for name, array in (("database", database), *((f"distractors {i}", d) for i, d in enumerate(distractors))):
        if array.ndim != 2 or array.shape[1] != queries.shape[1]:
            raise DataError(f"{name}: shape {array.shape}, queries have {queries.shape[1]} dimensions.")


def _float32(array: Float[ndarray, "rows dim"]) -> Float32[ndarray, "rows dim"]:
    return np.ascontiguousarray(array, dtype=np.float32)
