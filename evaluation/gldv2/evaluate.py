"""Official submissions of Google Landmarks v2, scored: what `lookalike evaluate submission` does."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluation.gldv2.recognition import score_recognition
from evaluation.gldv2.retrieval import score_retrieval
from evaluation.gldv2.solutions import read_recognition_solution, read_retrieval_solution
from evaluation.gldv2.submissions import read_recognition_submission, read_retrieval_submission
from evaluation.outputs import Outputs, conclude
from evaluation.protocols import RETRIEVAL_PROTOCOL, retrieval_sections
from evaluation.record import record_of_files
from evaluation.result import Result, Section, result_tree
from lookalike.artifacts import file_sha256

_RECOGNITION_PROTOCOL = (
    "each query names a landmark or none; gap: all answers ranked together by confidence, precision at each right one, "
    "divided by the queries that show a landmark; top1: share of those whose landmark is named"
)


def evaluate_submission(
    task: Literal["retrieval", "recognition"], *, solution: Path, predictions: Path, outputs: Outputs
) -> tuple[dict[str, Any], list[str]]:
    """mAP@100, or GAP and top-1, of the public and the private queries.

    Raises:
        DataError: a file cannot be read, or names queries that the solution does not know.
    """
    outputs.check()
    if task == "retrieval":
        truth = read_retrieval_solution(solution)
        scores = score_retrieval(read_retrieval_submission(predictions, truth.usages), truth)
        sections, protocol, ties = retrieval_sections(scores, {}), RETRIEVAL_PROTOCOL, "as submitted"
    else:
        sections = _recognition_sections(solution, predictions)
        protocol, ties = _RECOGNITION_PROTOCOL, "by query id"
    record = record_of_files(f"gldv2 {task}", protocol, {}, ground_truth=file_sha256(solution), ties=ties)
    tree = {**record.as_json(), "submission": predictions.name, "submission_sha256": file_sha256(predictions)}
    result = Result(f"gldv2 {task}", sections, tree)
    _, lines = conclude(result, outputs, name=predictions.stem, title=f"Google Landmarks v2: {task}")
    return result_tree(result), lines


def _recognition_sections(solution: Path, predictions: Path) -> dict[str, Section]:
    truth = read_recognition_solution(solution)
    scores = score_recognition(read_recognition_submission(predictions, truth.usages), truth)
    sections = {}
    for usage in ("Public", "Private"):
        if usage in scores.usages:
            own = scores.of_usage(usage)
            with_landmark = own.of_queries_with_landmark()
            sections[usage.lower()] = Section(
                own.query_names,
                np.arange(len(own.query_names)),
                {"gap": own.gap_values(), "top1": own.top1_values()},
                facts={
                    "gap_of_queries_with_landmark": 100 * with_landmark.global_average_precision(),
                    "tie_gap": 100 * own.tie_gap(),
                    "num_missing_queries": own.num_missing_queries,
                },
            )
    return sections
