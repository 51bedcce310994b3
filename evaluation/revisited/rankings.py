"""Rankings made elsewhere, by an index or a server: numbers where the lists decide them, bounds where they do not."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from evaluation.result import Section
from evaluation.revisited.evaluate import PRECISION_KS, RevisitedOutcome
from evaluation.revisited.ground_truth import SETUPS, GroundTruth, QueryLabels, Setup, landmark_clusters
from lookalike.errors import DataError
from lookalike.ranking_metrics import Metric, bounds, landmark_metrics, positions_in_list


def evaluate_rankings(
    ranked_rows: Int64[ndarray, "lists depth"], truth: GroundTruth, *, num_distractors: int
) -> RevisitedOutcome:
    """What lists of the first few say of the ranking of the whole gallery, all `num_distractors` included.

    A metric whose value is the same for every query however its list goes on is a number; of the others the least and
    the greatest value are in the section's bounds. Other evaluations of short lists count what was not found as never
    found, or divide by the length of the list: numbers that are no mAP of this benchmark.

    Args:
        ranked_rows: A list per query, best first: rows of the database, then those of the distractors; -1 where there
            are no more.
        num_distractors: Those that the search went over, listed or not.

    Raises:
        DataError: not one list per query, or a list names a row twice, names one that does not exist, or has a gap.
    """
    num_gallery = len(truth.database_names) + num_distractors
    _require_lists(ranked_rows, truth, num_gallery)
    clusters = landmark_clusters(truth)
    facts = {"shortest_list": int((ranked_rows >= 0).sum(axis=1).min(initial=num_gallery))}
    metrics = landmark_metrics(PRECISION_KS)
    sections: dict[Setup, Section] = {}
    for setup in SETUPS:
        of_queries = [
            _bounds_of_query(row, labels, setup, metrics, num_gallery)
            for row, labels in zip(ranked_rows, truth.labels, strict=True)
        ]
        extremes = dict(zip(metrics, np.stack(of_queries, axis=1), strict=True))  # [metrics, queries, 2]
        is_decided = {name: np.array_equal(v[:, 0], v[:, 1], equal_nan=True) for name, v in extremes.items()}
        sections[setup] = Section(
            truth.query_names,
            clusters,
            {name: values[:, 0] for name, values in extremes.items() if is_decided[name]},
            {name: values for name, values in extremes.items() if not is_decided[name]},
            facts,
        )
    return RevisitedOutcome(sections, num_distractors)


def _bounds_of_query(
    ranked_rows: Int64[ndarray, "depth"],
    labels: QueryLabels,
    setup: Setup,
    metrics: Mapping[str, Metric],
    num_gallery: int,
) -> Float64[ndarray, "metrics 2"]:
    rows, is_relevant = labels.labelled(), labels.is_relevant(setup)
    found, depth = positions_in_list(ranked_rows, rows[is_relevant], rows[~is_relevant])
    num_relevant = int(is_relevant.sum())
    num_ranked = num_gallery - int((~is_relevant).sum())
    return np.array(
        [
            bounds(metric, found, num_relevant=num_relevant, depth=depth, num_ranked=num_ranked)
            for metric in metrics.values()
        ]
    )


def _require_lists(ranked_rows: Int64[ndarray, "lists depth"], truth: GroundTruth, num_gallery: int) -> None:
    if len(ranked_rows) != len(truth.query_names):
        raise DataError(f"{len(ranked_rows)} rankings, the ground truth has {len(truth.query_names)} queries.")
    for name, ranked in zip(truth.query_names, ranked_rows, strict=True):
        if len(ranked) and not (ranked.min() >= -1 and ranked.max() < num_gallery):
            odd = int(ranked[(ranked < -1) | (ranked >= num_gallery)][0])
            raise DataError(
                f"the ranking of {name} names row {odd}; database and distractors have {num_gallery} rows, from 0."
            )
        if (np.diff((ranked >= 0).astype(np.int8)) > 0).any():
            raise DataError(f"the ranking of {name} goes on behind a -1, which marks its end.")
        listed, times = np.unique(ranked[ranked >= 0], return_counts=True)
        if (times > 1).any():
            raise DataError(f"the ranking of {name} names row {int(listed[times > 1][0])} more than once.")
