"""Predictions in the official form that the challenges take: read, and written so that they read back equal."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from evaluation.gldv2.official_csv import MAX_LANDMARK, image_id, is_image_id, landmark_id, rows_by_query, score
from lookalike.artifacts import write_text_atomically
from lookalike.errors import DataError

MAX_IMAGES = 100  # of a retrieval submission, per query

_RETRIEVAL_HEADER = "id,images"
_RECOGNITION_HEADER = "id,landmarks"


def read_retrieval_submission(file: Path, queries: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Reads `id,images`: test image -> index images, best first, repetitions included.

    Args:
        queries: Every test image that there is, ignored ones too: a solution's `usages`.

    Raises:
        DataError: the file cannot be read; a row has the wrong form, an unknown test image or that of an earlier row.
            File and line are named.
    """
    predictions = {}
    for where, query, (images,) in rows_by_query(file, header=_RETRIEVAL_HEADER):
        _require_known(query, queries, where)
        predictions[query] = tuple(image_id(text, where) for text in images.split())
    return predictions


def read_recognition_submission(file: Path, queries: Collection[str]) -> dict[str, tuple[int, float] | None]:
    """Reads `id,landmarks`: test image -> (landmark, score), None where the row is empty.

    Args:
        queries: Every test image that there is, ignored ones too: a solution's `usages`.

    Raises:
        DataError: the file cannot be read; a row has the wrong form, an unknown test image or that of an earlier row,
            or a score that is not a finite number. File and line are named.
    """
    predictions: dict[str, tuple[int, float] | None] = {}
    for where, query, (prediction,) in rows_by_query(file, header=_RECOGNITION_HEADER):
        _require_known(query, queries, where)
        parts = prediction.split()
        if len(parts) not in (0, 2):
            raise DataError(f"{where}: one landmark and its score are expected, found {len(parts)} values.")
        predictions[query] = (landmark_id(parts[0], where), score(parts[1], where)) if parts else None
    return predictions


def write_retrieval_submission(file: Path, rankings: Mapping[str, Sequence[str]]) -> None:
    """Writes `id,images`, atomically.

    Args:
        rankings: Test image -> index images, best first, at most 100.

    Raises:
        ValueError: a ranking is longer, or an id is not an official one; nothing is written.
    """
    for query, images in rankings.items():
        if len(images) > MAX_IMAGES:
            raise ValueError(f"query {query} has {len(images)} images; a submission takes {MAX_IMAGES}")
        for image in (query, *images):
            _require_image_id(image)
    _write(file, _RETRIEVAL_HEADER, {query: " ".join(images) for query, images in rankings.items()})


def write_recognition_submission(file: Path, predictions: Mapping[str, tuple[int, float] | None]) -> None:
    """Writes `id,landmarks`, atomically.

    Args:
        predictions: Test image -> (landmark, score), or None for no landmark.

    Raises:
        ValueError: a test image's id is not an official one, a landmark is negative or has more than 18 digits, or a
            score is not finite; nothing is written.
    """
    for query, prediction in predictions.items():
        _require_image_id(query)
        if prediction is not None and not (0 <= prediction[0] <= MAX_LANDMARK and math.isfinite(prediction[1])):
            raise ValueError(f"query {query} has the prediction {prediction}; give None for no landmark")
    _write(file, _RECOGNITION_HEADER, {query: _prediction_text(p) for query, p in predictions.items()})


def _prediction_text(prediction: tuple[int, float] | None) -> str:
    if prediction is None:
        return ""
    landmark, confidence = prediction
    # The shortest decimals that read back as the same float64; float() because numpy's float64 shows its type's name.
    return f"{landmark} {float(confidence)!r}"


def _write(file: Path, header: str, rows: Mapping[str, str]) -> None:
    lines = [header, *(f"{query},{text}" for query, text in rows.items())]
    write_text_atomically(file, "\n".join(lines) + "\n")


def _require_known(query: str, queries: Collection[str], where: str) -> None:
    if query not in queries:
        raise DataError(f"{where}: test image {query} is not in the solution. Is this a submission for other images?")


def _require_image_id(text: str) -> None:
    if not is_image_id(text):
        raise ValueError(f"{text!r} is no image id, which is 16 hexadecimal digits in lower case")
