"""Anybody's descriptors from `.npy` files, judged by a benchmark: what `lookalike evaluate descriptors` does."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from evaluation.bootstrap import bootstrap_mean
from evaluation.leave_one_out import evaluate_leave_one_out
from evaluation.revisited.evaluate import PRECISION_KS, evaluate_descriptors, result_as_json
from evaluation.revisited.ground_truth import SETUPS, load_ground_truth
from evaluation.revisited.rank_counts import TieRule
from lookalike.artifacts import file_sha256, versions, write_text_atomically
from lookalike.errors import DataError

Benchmark = Literal["roxford5k", "rparis6k"]
OFFICIAL_DATABASE_SIZE: dict[Benchmark, int] = {"roxford5k": 4993, "rparis6k": 6322}
_LARGEST_NORM_ERROR = 1e-2

logger = logging.getLogger(__name__)


def evaluate_revisited_files(
    benchmark: Benchmark,
    *,
    ground_truth: Path,
    queries: Path,
    database: Path,
    distractors: Sequence[Path],
    ties: TieRule,
    out: Path | None,
) -> tuple[dict[str, Any], list[str]]:
    """The official numbers in percent, with 95% intervals over queries, as JSON and as lines of text.

    Raises:
        DataError: a file cannot be read, or counts, dimensions or values do not fit.
    """
    truth = load_ground_truth(ground_truth)
    expected = OFFICIAL_DATABASE_SIZE[benchmark]
    if len(truth.database_names) != expected:
        raise DataError(f"{ground_truth} lists {len(truth.database_names)} pictures, {benchmark} has {expected}.")
    arrays = {"queries": load_vectors(queries), "database": load_vectors(database)}
    others = [load_vectors(path) for path in distractors]
    for name, array in arrays.items():
        _warn_about_norms(name, array)
    result = evaluate_descriptors(
        arrays["queries"],
        arrays["database"],
        truth,
        distractors=others,
        ties=ties,
        progress_file=out.with_name(f"{out.name}.progress.npz") if out else None,
    )
    record = {
        "benchmark": benchmark,
        "ground_truth_sha256": truth.sha256,
        "num_queries": len(truth.query_names),
        "num_database": len(truth.database_names),
        "queries": _provenance(queries, arrays["queries"]),
        "database": _provenance(database, arrays["database"]),
        "distractors": [_provenance(p, a) for p, a in zip(distractors, others, strict=True)],
        "similarity": "inner product in float32",
        "versions": versions(),
    }
    tree = result_as_json(result, truth, record)
    for setup in SETUPS:
        values = result.per_query[setup]["map"]
        estimate = bootstrap_mean(values, np.arange(len(values)))
        tree[setup]["map_interval"] = [100 * estimate.low, 100 * estimate.high]
    if out:
        write_text_atomically(out, json.dumps(tree, indent=2) + "\n")
    return tree, _lines(tree)


def evaluate_labelled_files(
    *, vectors: Path, labels: Path, ks: Sequence[int], out: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Leave-one-out hit rates and MAP@R of vectors with one label each, with 95% intervals over classes."""
    rows, classes = load_vectors(vectors), _load(labels)
    if classes.ndim != 1 or len(classes) != len(rows) or not np.issubdtype(classes.dtype, np.integer):
        raise DataError(
            f"{labels}: expected {len(rows)} whole numbers, found {classes.dtype} of shape {classes.shape}."
        )
    _warn_about_norms("vectors", rows)
    own = np.ascontiguousarray(rows, dtype=np.float32)
    if not np.isfinite(own).all():
        raise DataError(f"{vectors} holds NaN or infinity.")
    result = evaluate_leave_one_out(own, np.arange(len(own)), classes.astype(np.int64), ks=ks)
    metrics = {name: {"mean": e.mean, "low": e.low, "high": e.high} for name, e in result.estimates().items()}
    tree = {
        "metrics": metrics,
        "num_queries": len(result.query_ids),
        "num_gallery": result.num_gallery,
        "num_alone": result.num_alone,
        "record": {"vectors": _provenance(vectors, rows), "labels_sha256": file_sha256(labels), "versions": versions()},
    }
    if out:
        write_text_atomically(out, json.dumps(tree, indent=2) + "\n")
    lines = [f"{name}: {m['mean']:.4f} [{m['low']:.4f}, {m['high']:.4f}]" for name, m in metrics.items()]
    return tree, [*lines, f"{tree['num_queries']} queries, {tree['num_gallery']} in the gallery"]


def load_vectors(path: Path) -> ndarray:
    """A memory-mapped `.npy` of rows of floats.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    array = _load(path)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path}: expected rows of floats, found {array.dtype} of shape {array.shape}.")
    return array


def _load(path: Path) -> ndarray:
    try:
        array: ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}.") from error
    return array


def _warn_about_norms(name: str, array: ndarray) -> None:
    norms = np.linalg.norm(np.asarray(array[:1000], np.float32), axis=1)
    worst = float(np.abs(norms - 1).max(initial=0))
    if worst > _LARGEST_NORM_ERROR:
        logger.warning("%s are not of unit length (off by up to %.2g): scores are no cosine similarities", name, worst)


def _provenance(path: Path, array: ndarray) -> dict[str, Any]:
    return {"file": path.name, "dtype": str(array.dtype), "shape": list(array.shape)}


def _lines(tree: dict[str, Any]) -> list[str]:
    lines = [f"{'':<7} {'mAP':>6} {'95% interval':>17} {'mP@1':>6} {'mP@5':>6} {'mP@10':>6}  queries  tie gap"]
    for setup in SETUPS:
        values = tree[setup]
        low, high = values["map_interval"]
        precisions = " ".join(f"{values[f'mp@{k}']:6.2f}" for k in PRECISION_KS)
        lines.append(
            f"{setup:<7} {values['map']:6.2f} {f'[{low:.2f}, {high:.2f}]':>17} {precisions}  "
            f"{values['num_queries']:7d}  {values['tie_gap']:.3f}"
        )
    return [*lines, f"{tree['record']['num_distractors']:,} distractors, ties by rule: {tree['record']['ties']}"]
