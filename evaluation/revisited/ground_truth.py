"""The official ground truth: which database pictures are easy, hard or junk for each query."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from data_pipelines.sources.revisited import read_ground_truth
from lookalike.artifacts import file_sha256
from lookalike.errors import DataError

Setup = Literal["easy", "medium", "hard"]
SETUPS: tuple[Setup, ...] = ("easy", "medium", "hard")
_LEAST_SHARED = 0.3
_LABELS_OF_SETUP: dict[Setup, tuple[str, ...]] = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}


@dataclass(frozen=True)
class QueryLabels:
    """Database rows, 0-based; the three are disjoint."""

    easy: Int64[ndarray, "_"]
    hard: Int64[ndarray, "_"]
    junk: Int64[ndarray, "_"]

    def labelled(self) -> Int64[ndarray, "labelled"]:
        """Rows with any label; in every setup each of them is either relevant or ignored."""
        return np.concatenate([self.easy, self.hard, self.junk])

    def is_relevant(self, setup: Setup) -> ndarray:
        """Which of `labelled()` count as found in this setup; the others are taken out of the ranking."""
        parts = [
            np.full(len(getattr(self, name)), name in _LABELS_OF_SETUP[setup]) for name in ("easy", "hard", "junk")
        ]
        return np.concatenate(parts)


@dataclass(frozen=True)
class GroundTruth:
    """What `gnd_roxford5k` or `gnd_rparis6k` hold, whatever their format."""

    database_names: tuple[str, ...]
    query_names: tuple[str, ...]
    query_boxes: Float64[ndarray, "queries 4"]  # left, top, right, bottom in pixels of the query's picture
    labels: tuple[QueryLabels, ...]
    sha256: str  # of the file


def landmark_clusters(truth: GroundTruth) -> Int64[ndarray, "queries"]:
    """Which queries show the same landmark, and so err together: numbers from 0, by first query.

    The files do not say it. Two queries belong together where the easy and hard pictures that they share are more than
    0.3 of those that either has, or where other queries link them so. Both have 11 landmarks; that gives 11 clusters in
    Paris and 12 in Oxford, where one query stands alone.
    """
    holds = np.zeros((len(truth.labels), len(truth.database_names)), np.float32)
    for query, labels in enumerate(truth.labels):
        holds[query, np.concatenate([labels.easy, labels.hard])] = 1
    num_shared, sizes = holds @ holds.T, holds.sum(axis=1)  # whole numbers below 2^24: exact
    is_linked = num_shared > _LEAST_SHARED * (sizes[:, None] + sizes[None, :] - num_shared)
    np.fill_diagonal(is_linked, val=True)
    clusters = np.arange(len(truth.labels))
    while True:  # each query takes the smallest number among those linked with it, until nothing changes
        smallest = np.where(is_linked, clusters[None, :], len(clusters)).min(axis=1, initial=len(clusters))
        if (smallest == clusters).all():
            return np.unique(clusters, return_inverse=True)[1].astype(np.int64)
        clusters = smallest


def load_ground_truth(path: Path) -> GroundTruth:
    """Reads the official pickle, without executing anything in it, its MATLAB twin, or the same content as JSON.

    Raises:
        DataError: it is missing, of another kind, holds more than plain values, or contradicts itself.
    """
    contents = read_ground_truth(path)
    try:
        truth = _parse(contents, sha256=file_sha256(path))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the ground truth of revisited Oxford or Paris: {error!r}.") from error
    _require_sound(truth, path)
    return truth


def _parse(tree: Any, *, sha256: str) -> GroundTruth:
    entries = tree["gnd"]
    return GroundTruth(
        database_names=tuple(str(name) for name in tree["imlist"]),
        query_names=tuple(str(name) for name in tree["qimlist"]),
        query_boxes=np.array([entry["bbx"] for entry in entries], np.float64).reshape(len(entries), 4),
        labels=tuple(
            QueryLabels(*(np.array(entry[name], np.int64).reshape(-1) for name in ("easy", "hard", "junk")))
            for entry in entries
        ),
        sha256=sha256,
    )


def _require_sound(truth: GroundTruth, path: Path) -> None:
    if len(truth.labels) != len(truth.query_names):
        raise DataError(f"{path} names {len(truth.query_names)} queries and labels {len(truth.labels)}.")
    for name, labels in zip(truth.query_names, truth.labels, strict=True):
        rows = labels.labelled()
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(truth.database_names)):
            raise DataError(
                f"{path}: query {name} labels a row outside the {len(truth.database_names)} of the database."
            )
        if len(np.unique(rows)) != len(rows):
            raise DataError(f"{path}: query {name} labels a row twice.")
