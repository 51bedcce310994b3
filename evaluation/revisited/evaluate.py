"""Descriptors -> the official numbers of revisited Oxford and Paris, exact with any number of distractors."""

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from numpy import ndarray

from evaluation.revisited.ground_truth import SETUPS, GroundTruth, Setup
from evaluation.revisited.metrics import average_precision, precision_at_k, recall_at_k
from evaluation.revisited.rank_counts import RankCounts, TieRule
from lookalike.artifacts import write_atomically
from lookalike.errors import DataError
from lookalike.progress import Progress

logger = logging.getLogger(__name__)

PRECISION_KS = (1, 5, 10)
# A product is computed on blocks of one shape, padded with zeros where a file ends, so that a descriptor's score never
# depends on how the distractors are divided. In float32 a block of 2048 dimensions takes 64 MiB.
_BLOCK_ROWS = 8192
_BLOCKS_PER_SAVE = 16


@dataclass(frozen=True)
class RevisitedResult:
    """Values per query in [0, 1]; NaN where a setup has no relevant picture for a query."""

    per_query: Mapping[Setup, Mapping[str, Float64[ndarray, "queries"]]]  # setup -> "map", "mp@k", "mr@k" -> values
    tie_gap: Mapping[Setup, float]  # mAP of the optimistic minus that of the pessimistic tie rule
    num_distractors: int
    ties: TieRule

    def mean(self, setup: Setup, metric: str) -> float:
        """Over the queries that have a relevant picture in this setup."""
        return _mean(self.per_query[setup][metric])


def evaluate_descriptors(
    queries: Float[ndarray, "queries dim"],
    database: Float[ndarray, "database database_dim"],
    truth: GroundTruth,
    *,
    distractors: Sequence[Float[ndarray, "_ _"]] = (),
    ties: TieRule = "index",
    progress_file: Path | None = None,
) -> RevisitedResult:
    """Scores by inner product in float32, counts ranks in one pass, and computes all setups.

    Args:
        queries: In the order of the ground truth; of the cropped query pictures.
        database: In the order of the ground truth.
        distractors: May be memory-mapped, of any float type; read block by block.
        ties: Whether unlabelled pictures of equal score stand before or behind; the gap is reported.
        progress_file: Counts are kept there now and then, and a rerun continues from them.

    Raises:
        DataError: counts, dimensions or values do not fit; the message says which.
    """
    _require_shapes(queries, database, truth, distractors)
    own_queries = _float32(queries)
    with np.errstate(all="ignore"):  # what is not finite is refused by name
        scores = own_queries @ _float32(database).T
    try:
        counts = RankCounts.of_database(scores, truth.labels)
    except ValueError as error:
        raise DataError(f"descriptors of {len(database)} database pictures: {error}.") from error
    _count_distractors(counts, own_queries, distractors, progress_file)
    return summarise_counts(counts, truth, ties=ties)


def summarise_counts(counts: RankCounts, truth: GroundTruth, *, ties: TieRule) -> RevisitedResult:
    per_query: dict[Setup, dict[str, ndarray]] = {}
    tie_gap: dict[Setup, float] = {}
    for setup in SETUPS:
        positions = counts.positions(truth.labels, setup, ties=ties)
        values = {"map": np.array([average_precision(p) for p in positions])}
        for k in PRECISION_KS:
            values[f"mp@{k}"] = np.array([precision_at_k(p, k) for p in positions])
            values[f"mr@{k}"] = np.array([recall_at_k(p, k) for p in positions])
        per_query[setup] = values
        bounds = [
            _mean(np.array([average_precision(p) for p in counts.positions(truth.labels, setup, ties=rule)]))
            for rule in ("optimistic", "pessimistic")
        ]
        tie_gap[setup] = bounds[0] - bounds[1]
    return RevisitedResult(per_query, tie_gap, counts.num_distractors, ties)


def result_as_json(result: RevisitedResult, truth: GroundTruth, record: Mapping[str, Any]) -> dict[str, Any]:
    """Values in percent, average precisions per query, and how they were measured."""
    tree: dict[str, Any] = {}
    for setup in SETUPS:
        values = result.per_query[setup]
        aps = [None if np.isnan(ap) else 100 * float(ap) for ap in values["map"]]
        tree[setup] = {
            **{metric: 100 * result.mean(setup, metric) for metric in values},
            "num_queries": sum(ap is not None for ap in aps),
            "tie_gap": 100 * result.tie_gap[setup],
            "aps": dict(zip(truth.query_names, aps, strict=True)),
        }
    return {**tree, "record": {**record, "ties": result.ties, "num_distractors": result.num_distractors}}


def _mean(values: Float64[ndarray, "queries"]) -> float:
    """Over the queries that have a value; NaN where none has."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else float("nan")


def _count_distractors(
    counts: RankCounts,
    queries: Float32[ndarray, "queries dim"],
    distractors: Sequence[ndarray],
    progress_file: Path | None,
) -> None:
    blocks = list(_blocks(distractors))
    done = _load_progress(counts, queries, blocks, progress_file)
    block = np.zeros(
        (_BLOCK_ROWS, queries.shape[1]), np.float32
    )  # one for all: fresh memory costs as much as a product
    with Progress(sum(n for _, _, n in blocks), description="distractors", unit="vectors") as progress:
        progress.advance(sum(n for _, _, n in blocks[:done]))
        for number, (source, start, length) in enumerate(blocks[done:], start=done + 1):
            _read_into(block, source[start : start + length])
            with np.errstate(all="ignore"):
                scores = queries @ block.T
            try:
                counts.add_distractors(scores[:, :length])
            except ValueError as error:
                raise DataError(f"distractors {start} to {start + length}: {error}.") from error
            progress.advance(length)
            if progress_file and number % _BLOCKS_PER_SAVE == 0:
                _save_progress(counts, queries, blocks, number, progress_file)
    if progress_file:
        progress_file.unlink(missing_ok=True)


def _read_into(block: Float32[ndarray, "rows dim"], descriptors: Float[ndarray, "length dim"]) -> None:
    """Fills a block and pads it with zeros. torch converts float16 eight times as fast as numpy."""
    length = len(descriptors)
    if descriptors.dtype == np.float16:
        torch.from_numpy(block[:length]).copy_(torch.from_numpy(np.array(descriptors)))
    else:
        block[:length] = descriptors
    block[length:] = 0


def _blocks(distractors: Sequence[ndarray]) -> Iterator[tuple[ndarray, int, int]]:
    for source in distractors:
        for start in range(0, len(source), _BLOCK_ROWS):
            yield source, start, min(_BLOCK_ROWS, len(source) - start)


def _save_progress(counts: RankCounts, queries: ndarray, blocks: Sequence[Any], num_done: int, file: Path) -> None:
    buffer = io.BytesIO()
    stored: dict[str, Any] = {"identity": _identity(counts, queries, blocks), "num_done": num_done, **counts.state()}
    np.savez(buffer, **stored)
    write_atomically(file, buffer.getvalue())


def _load_progress(counts: RankCounts, queries: ndarray, blocks: Sequence[Any], file: Path | None) -> int:
    if file is None or not file.exists():
        return 0
    with np.load(file, allow_pickle=False) as stored:
        if str(stored["identity"]) != _identity(counts, queries, blocks):
            raise DataError(f"{file} holds the counts of another evaluation. Remove it, or name another file.")
        counts.load_state({name: stored[name] for name in ("num_above", "num_tied", "num_distractors")})
        logger.info("continuing after %d of %d blocks of distractors", int(stored["num_done"]), len(blocks))
        return int(stored["num_done"])


def _identity(counts: RankCounts, queries: ndarray, blocks: Sequence[tuple[ndarray, int, int]]) -> str:
    """Of queries, thresholds and the division into blocks, with one descriptor of each block as a sample."""
    digest = hashlib.sha256(queries.tobytes())
    for query in counts.queries:
        digest.update(query.scores.tobytes())
    for source, start, length in blocks:
        digest.update(f"{start}:{length}:{source.dtype}".encode())
        digest.update(np.ascontiguousarray(source[start]).tobytes())
    return digest.hexdigest()


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
