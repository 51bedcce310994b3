"""How far definitions that look alike lie apart: mean average precision of Oxford and Paris, and recall@k of classes.

python benchmarks/metric_definitions.py        half a minute

Scores of Oxford and Paris are made up and seeded, the ground truth is the official one; vectors of classes are made up.
"""

from pathlib import Path

import numpy as np
from numpy import ndarray

from evaluation.classes.protocols import leave_one_out, random_gallery
from evaluation.revisited.ground_truth import SETUPS, GroundTruth, Setup, load_ground_truth
from lookalike.ranking_metrics import average_precision, trapezoid_average_precision

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "revisited"


def main() -> None:
    print(
        "| mAP | official | rectangles | junk counts as wrong | first 100 only | first 100, divided by what they hold |"
    )
    print("|---|---|---|---|---|---|")
    for benchmark in ("roxford5k", "rparis6k"):
        truth = load_ground_truth(GOLDEN / f"gnd_{benchmark}.pkl")
        with np.load(GOLDEN / f"{benchmark}_scores_f32.npz") as stored:
            rankings = np.argsort(-stored["scores"], axis=1, kind="stable")
        for setup in SETUPS:
            print(f"| {benchmark} {setup} | " + " | ".join(f"{v:.2f}" for v in variants(rankings, truth, setup)) + " |")
    print("\n| vectors of classes | R@1 by id | R@1 by dropping the first hit | one random picture per class |")
    print("|---|---|---|---|")
    for share in (0.0, 0.02, 0.1):
        print(
            f"| {share:.0%} of them copies of others | " + " | ".join(f"{v:.2f}" for v in class_variants(share)) + " |"
        )


def variants(rankings: ndarray, truth: GroundTruth, setup: Setup) -> list[float]:
    values: list[list[float]] = []
    for ranking, labels in zip(rankings, truth.labels, strict=True):
        rows, is_relevant = labels.labelled(), labels.is_relevant(setup)
        relevant, junk = rows[is_relevant], rows[~is_relevant]
        if not len(relevant):
            continue
        positions = np.flatnonzero(np.isin(ranking[~np.isin(ranking, junk)], relevant))
        with_junk = np.flatnonzero(np.isin(ranking, relevant))
        first = ranking[:100]
        short = np.flatnonzero(np.isin(first[~np.isin(first, junk)], relevant))
        of_list = trapezoid_average_precision(short) if len(short) else 0.0
        values.append(
            [
                trapezoid_average_precision(positions),
                average_precision(positions),
                trapezoid_average_precision(with_junk),
                of_list * len(short) / len(relevant),
                of_list * len(short) / min(len(relevant), 100),
            ]
        )
    return (100 * np.mean(values, axis=0)).tolist()


def class_variants(share_of_copies: float) -> list[float]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(600), 5)
    vectors = generator.normal(size=(600, 64))[labels] + 1.6 * generator.normal(size=(3000, 64))
    num_copies = int(share_of_copies * 3000)
    targets = generator.choice(3000, num_copies, replace=False)
    vectors[targets] = vectors[generator.choice(3000, num_copies)]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(3000)
    by_id = leave_one_out(vectors, ids, labels, ks=(1,)).mean("hit_rate@1")
    first_dropped = np.argsort(-(vectors @ vectors.T), axis=1, kind="stable")[:, 1]
    shortcut = float((labels[first_dropped] == labels).mean())
    apart = random_gallery(vectors, ids, labels, ks=(1,)).mean("hit_rate@1")
    return [100 * by_id, 100 * shortcut, 100 * apart]


if __name__ == "__main__":
    main()
