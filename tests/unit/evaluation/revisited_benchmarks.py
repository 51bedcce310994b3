"""Golden values of revisited Oxford and Paris, and a small benchmark like them."""

import json
from pathlib import Path

import numpy as np
from numpy import ndarray

from evaluation.revisited.ground_truth import GroundTruth, QueryLabels

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "revisited"
OFFICIAL = json.loads((GOLDEN / "golden_revisitop.json").read_text())
LETTER = {"easy": "E", "medium": "M", "hard": "H"}


def small_benchmark(seed: int = 0, *, num_database: int = 200) -> tuple[GroundTruth, ndarray, ndarray, ndarray]:
    """Five queries of ten easy, ten hard and ten junk pictures, and 1000 distractors."""
    generator = np.random.default_rng(seed)
    labels = tuple(QueryLabels(*np.split(generator.permutation(num_database)[:30], [10, 20])) for _ in range(5))
    truth = GroundTruth(tuple(map(str, range(num_database))), tuple("abcde"), np.zeros((5, 4)), labels, "f" * 64)
    vectors = generator.normal(size=(5 + num_database + 1000, 16)).astype(np.float16)
    queries, database, distractors = np.split(vectors, [5, 5 + num_database])
    return truth, queries, database, distractors
