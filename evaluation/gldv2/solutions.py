"""The official answers: which index images, or which landmarks, belong to each test image, and where it counts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from evaluation.gldv2.official_csv import image_id, landmark_id, rows_by_query
from lookalike.errors import DataError

Answer = TypeVar("Answer", str, int)
ScoredUsage = Literal["Public", "Private"]
Usage = Literal["Public", "Private", "Ignored"]


@dataclass(frozen=True)
class RetrievalSolution:
    """`retrieval_solution_v2.1.csv`."""

    usages: Mapping[str, Usage]  # of every test image, in the file's order
    relevant: Mapping[str, frozenset[str]]  # scored test image -> index images of its landmark, at least one


@dataclass(frozen=True)
class RecognitionSolution:
    """`recognition_solution_v2.1.csv`."""

    usages: Mapping[str, Usage]  # of every test image, in the file's order
    landmarks: Mapping[str, frozenset[int]]  # scored test image -> landmarks that it shows, mostly none


def read_retrieval_solution(file: Path) -> RetrievalSolution:
    """Reads `id,images,Usage`; the images of an ignored row, officially "None", are not looked at.

    Raises:
        DataError: the file cannot be read or scores no query; a row has the wrong form, an unknown usage, the test
            image of an earlier one, an image twice, or is scored and names no image. File and line are named.
    """
    usages: dict[str, Usage] = {}
    relevant: dict[str, frozenset[str]] = {}
    for where, query, answer, usage in _rows(file, header="id,images,Usage"):
        usages[query] = usage
        if usage != "Ignored":
            images = [image_id(text, where) for text in answer.split()]
            if not images:
                raise DataError(f"{where}: test image {query} is {usage} and has no images; it could not be scored.")
            relevant[query] = _without_repetition(images, where)
    _require_scored(relevant, file)
    return RetrievalSolution(usages, relevant)


def read_recognition_solution(file: Path) -> RecognitionSolution:
    """Reads `id,landmarks,Usage`; the landmarks of an ignored row are not looked at.

    Raises:
        DataError: the file cannot be read or scores no query; a row has the wrong form, an unknown usage, the test
            image of an earlier one, or a landmark twice. File and line are named.
    """
    usages: dict[str, Usage] = {}
    landmarks: dict[str, frozenset[int]] = {}
    for where, query, answer, usage in _rows(file, header="id,landmarks,Usage"):
        usages[query] = usage
        if usage != "Ignored":
            landmarks[query] = _without_repetition([landmark_id(text, where) for text in answer.split()], where)
    _require_scored(landmarks, file)
    return RecognitionSolution(usages, landmarks)


def _rows(file: Path, *, header: str) -> Iterator[tuple[str, str, str, Usage]]:
    """Place for messages, test image, its answer as text, and its usage."""
    for where, query, (answer, usage) in rows_by_query(file, header=header):
        for known in get_args(Usage):
            if usage == known:
                yield where, query, answer, known
                break
        else:
            raise DataError(f"{where}: the usage {usage[:40]!r} is none of {', '.join(get_args(Usage))}.")


def _without_repetition(answers: list[Answer], where: str) -> frozenset[Answer]:
    """A repeated answer would change the number of relevant ones, and with it every value."""
    if len(distinct := frozenset(answers)) != len(answers):
        raise DataError(f"{where}: the same answer stands there twice.")
    return distinct


def _require_scored(answers: Mapping[str, object], file: Path) -> None:
    if not answers:
        raise DataError(f"{file} has no Public or Private test image: nothing can be scored by it.")
