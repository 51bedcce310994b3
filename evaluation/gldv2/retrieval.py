"""Retrieval: mean average precision of the first 100 index images of each test image.

Not to be compared with the mAP of Oxford and Paris: here it is the rectangular rule on a list of 100.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from evaluation.gldv2.solutions import RetrievalSolution, ScoredUsage, Usage


@dataclass(frozen=True)
class RetrievalScores:
    """Values of every scored query, in the solution's order; one without predictions scores as an empty list."""

    query_names: tuple[str, ...]
    usages: tuple[Usage, ...]
    average_precisions: Float64[ndarray, "queries"]  # in [0, 1]
    precisions: Float64[ndarray, "queries k"]  # in [0, 1]; at 1, 2, ... k
    first_positions: Int64[ndarray, "queries"]  # of the first relevant image, from 1; k + 1 where the list has none
    is_missing: Bool[ndarray, "queries"]  # from the submission

    @property
    def num_missing_queries(self) -> int:
        return int(self.is_missing.sum())

    def of_usage(self, usage: ScoredUsage) -> "RetrievalScores":
        """Raises ValueError if no query has that usage."""
        rows = np.flatnonzero([own == usage for own in self.usages])
        if not len(rows):
            raise ValueError(f"the solution has no {usage} query")
        return RetrievalScores(
            query_names=tuple(self.query_names[row] for row in rows),
            usages=tuple(self.usages[row] for row in rows),
            average_precisions=self.average_precisions[rows],
            precisions=self.precisions[rows],
            first_positions=self.first_positions[rows],
            is_missing=self.is_missing[rows],
        )

    def mean_average_precision(self) -> float:
        return float(self.average_precisions.mean())

    def mean_precisions(self) -> Float64[ndarray, "k"]:
        """At 1, 2, ... k."""
        return self.precisions.mean(axis=0)

    def mean_position(self) -> float:
        return float(self.first_positions.mean())

    def median_position(self) -> float:
        return float(np.median(self.first_positions))


def average_precision_at_k(predicted: Sequence[str], relevant: Set[str], k: int = 100) -> float:
    """Sum of the precisions at the relevant ones among the first k, divided by min(number of relevant, k).

    A repeated image is never relevant again, and still takes up a place: [a, a, b] against {a, b} gives 5/6. NaN where
    nothing is relevant.

    Raises:
        ValueError: `k` is below 1.

    Source: Weyand, Araujo, Cao, Sim 2020, "Google Landmarks Dataset v2", arXiv:2004.01804, mAP@100. What becomes of
    repetitions is the rule of its published evaluation.
    """
    if not relevant:
        return float("nan")
    hits = _hits(predicted, relevant, k)
    return float(_average_precisions(hits[None], np.array([len(relevant)], np.int64))[0])


def score_retrieval(
    predictions: Mapping[str, Sequence[str]], solution: RetrievalSolution, *, k: int = 100
) -> RetrievalScores:
    """The official values of all queries that the solution scores; predictions of ignored ones do not count.

    Args:
        predictions: Test image -> index images, best first; of each the first k count.

    Raises:
        ValueError: a predicted query is not in the solution, one of the solution has no relevant image, there is none
            at all, or `k` is below 1.
    """
    if unknown := predictions.keys() - solution.usages.keys():
        raise ValueError(f"{len(unknown)} predicted queries are not in the solution, one of them {min(unknown)}")
    num_relevant = np.array([len(images) for images in solution.relevant.values()], np.int64)
    if not num_relevant.all() or not len(num_relevant):
        raise ValueError("every scored query needs a relevant image, and at least one has to be scored")
    hits = np.array([_hits(predictions.get(query, ()), images, k) for query, images in solution.relevant.items()])
    return RetrievalScores(
        query_names=tuple(solution.relevant),
        usages=tuple(solution.usages[query] for query in solution.relevant),
        average_precisions=_average_precisions(hits, num_relevant),
        precisions=_precisions(hits),
        first_positions=np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, k + 1),
        is_missing=np.array([query not in predictions for query in solution.relevant]),
    )


def _hits(predicted: Sequence[str], relevant: Set[str], k: int) -> Bool[ndarray, "k"]:
    """Which of the first k places hold a relevant image for the first time; False after the list's end."""
    if k < 1:
        raise ValueError(f"k is {k}; it has to be at least 1")
    hits = np.zeros(k, bool)
    found: set[str] = set()
    for place, image in enumerate(predicted[:k]):
        if image in relevant and image not in found:
            hits[place] = True
            found.add(image)
    return hits


def _precisions(hits: Bool[ndarray, "queries k"]) -> Float64[ndarray, "queries k"]:
    return hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)


def _average_precisions(
    hits: Bool[ndarray, "queries k"], num_relevant: Int64[ndarray, "queries"]
) -> Float64[ndarray, "queries"]:
    return (_precisions(hits) * hits).sum(axis=1) / np.minimum(num_relevant, hits.shape[1])
