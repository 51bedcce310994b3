"""Recognition: which landmark a test image shows, judged by global average precision (GAP) over all predictions.

Most test images show no landmark at all, and a prediction for one of them costs precision wherever it stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from evaluation.gldv2.solutions import RecognitionSolution, ScoredUsage, Usage
from evaluation.result import mean_of_known

# Which prediction stands first among those of equal confidence: that of the alphabetically first query, which is the
# official rule; a right one; or a wrong one.
TieRule = Literal["query_id", "optimistic", "pessimistic"]


@dataclass(frozen=True)
class RecognitionScores:
    """What was predicted for every scored query, in the solution's order, and whether it is right."""

    query_names: tuple[str, ...]
    usages: tuple[Usage, ...]
    shows_landmark: Bool[ndarray, "queries"]
    is_correct: Bool[ndarray, "queries"]
    confidences: Float64[ndarray, "queries"]  # NaN where no landmark was predicted
    is_missing: Bool[ndarray, "queries"]  # from the submission

    @property
    def num_missing_queries(self) -> int:
        return int(self.is_missing.sum())

    def of_usage(self, usage: ScoredUsage) -> "RecognitionScores":
        """Raises ValueError if no query has that usage."""
        rows = np.flatnonzero([own == usage for own in self.usages])
        if not len(rows):
            raise ValueError(f"the solution has no {usage} query")
        return self._at(rows)

    def of_queries_with_landmark(self) -> "RecognitionScores":
        """Predictions for images without a landmark are forgiven: the variant of GAP that ignores them."""
        return self._at(np.flatnonzero(self.shows_landmark))

    def gap_values(self, *, ties: TieRule = "query_id") -> Float64[ndarray, "queries"]:
        """The precision at each right prediction, 0 for other images with a landmark, NaN for those without one.

        GAP is the mean of what is not NaN. A value depends on all predictions: resampling the values takes the order
        of the predictions as given.

        Source: Weyand, Araujo, Cao, Sim 2020, "Google Landmarks Dataset v2", arXiv:2004.01804, micro average precision.
        """
        ranking = self._ranking(ties)
        correct = self.is_correct[ranking]
        precisions = correct.cumsum() / np.arange(1, len(ranking) + 1)
        values = np.where(self.shows_landmark, 0.0, np.nan)
        values[ranking[correct]] = precisions[correct]
        return values

    def global_average_precision(self, *, ties: TieRule = "query_id") -> float:
        """Divided by the number of images with a landmark, predicted or not; NaN where there is none."""
        return mean_of_known(self.gap_values(ties=ties))

    def tie_gap(self) -> float:
        """How much of GAP is left to the order of equally confident predictions: best minus worst."""
        return self.global_average_precision(ties="optimistic") - self.global_average_precision(ties="pessimistic")

    def top1_values(self) -> Float64[ndarray, "queries"]:
        """1 for a right prediction, 0 for other images with a landmark, NaN for those without one."""
        return np.where(self.shows_landmark, self.is_correct.astype(np.float64), np.nan)

    def top1_accuracy(self) -> float:
        """Over the images with a landmark, whatever the confidence; NaN where there is none."""
        return mean_of_known(self.top1_values())

    def _ranking(self, ties: TieRule) -> Int64[ndarray, "predictions"]:
        """Queries with a prediction, by falling confidence."""
        among_equals = {
            "query_id": np.zeros(len(self.query_names), bool),
            "optimistic": ~self.is_correct,
            "pessimistic": self.is_correct,
        }
        order = np.lexsort((np.array(self.query_names), among_equals[ties], -self.confidences))
        return order[~np.isnan(self.confidences[order])]

    def _at(self, rows: Int64[ndarray, "rows"]) -> "RecognitionScores":
        return RecognitionScores(
            query_names=tuple(self.query_names[row] for row in rows),
            usages=tuple(self.usages[row] for row in rows),
            shows_landmark=self.shows_landmark[rows],
            is_correct=self.is_correct[rows],
            confidences=self.confidences[rows],
            is_missing=self.is_missing[rows],
        )


def score_recognition(
    predictions: Mapping[str, tuple[int, float] | None], solution: RecognitionSolution
) -> RecognitionScores:
    """Judges the predictions of all queries that the solution scores; those of ignored ones do not count.

    Args:
        predictions: Test image -> (landmark, confidence), or None for no landmark. It is right if the landmark is one
            of those that the image shows.

    Raises:
        ValueError: a predicted query is not in the solution, a confidence is not finite, or the solution scores none.
    """
    if unknown := predictions.keys() - solution.usages.keys():
        raise ValueError(f"{len(unknown)} predicted queries are not in the solution, one of them {min(unknown)}")
    if not solution.landmarks:
        raise ValueError("at least one query has to be scored")
    given = {query: prediction for query, prediction in predictions.items() if prediction is not None}
    if not np.isfinite([confidence for _, confidence in given.values()]).all():
        raise ValueError("a confidence is not finite; give None for no landmark")
    queries = tuple(solution.landmarks)
    return RecognitionScores(
        query_names=queries,
        usages=tuple(solution.usages[query] for query in queries),
        shows_landmark=np.array([len(solution.landmarks[query]) > 0 for query in queries]),
        is_correct=np.array([query in given and given[query][0] in solution.landmarks[query] for query in queries]),
        confidences=np.array([given[query][1] if query in given else np.nan for query in queries], np.float64),
        is_missing=np.array([query not in predictions for query in queries]),
    )


@dataclass(frozen=True, slots=True)
class Recognised:
    """The most likely landmark of each query."""

    landmarks: Int64[ndarray, "queries"]  # -1 where a query has no neighbour
    confidences: Float64[ndarray, "queries"]  # sum of its neighbours' similarities; NaN where a query has none

    def as_predictions(self, query_names: Sequence[str]) -> dict[str, tuple[int, float] | None]:
        """As a submission takes them: query -> (landmark, confidence), None for no landmark."""
        return {
            name: (landmark, confidence) if landmark >= 0 else None
            for name, landmark, confidence in zip(
                query_names, self.landmarks.tolist(), self.confidences.tolist(), strict=True
            )
        }


def recognise(neighbour_landmarks: Int64[ndarray, "queries k"], scores: Float32[ndarray, "queries k"]) -> Recognised:
    """Lets the k nearest training images vote by their similarity; the landmark with the greatest sum wins.

    Of equal sums, the landmark that comes first among the neighbours wins.

    Args:
        neighbour_landmarks: Of the nearest training images, best first; -1 where there are no more.
        scores: Cosine similarities of these images; whatever stands where there are no more.

    Raises:
        ValueError: `k` is 0, or a similarity is not finite.

    Source: the baseline of Weyand, Araujo, Cao, Sim 2020, "Google Landmarks Dataset v2", arXiv:2004.01804, with global
    descriptors alone.
    """
    num_queries, k = neighbour_landmarks.shape
    if k == 0:
        raise ValueError("k is 0; at least one neighbour has to vote")
    is_neighbour = neighbour_landmarks >= 0
    if not np.isfinite(scores[is_neighbour]).all():
        raise ValueError("a similarity is not finite")
    distinct, landmark_numbers = np.unique(neighbour_landmarks, return_inverse=True)
    ballots = np.repeat(np.arange(num_queries), k) * len(distinct) + landmark_numbers.reshape(-1)
    _, candidates = np.unique(ballots, return_inverse=True)  # [queries * k], one number per query and landmark
    sums = np.bincount(candidates, weights=np.where(is_neighbour, scores, 0).reshape(-1))
    # Back to [queries, k]: each neighbour carries the sum of its landmark, so that the first maximum is the winner.
    totals = np.where(is_neighbour, sums[candidates].reshape(num_queries, k), -np.inf)
    winners = totals.argmax(axis=1)[:, None]
    landmarks = np.take_along_axis(neighbour_landmarks, winners, axis=1)[:, 0]
    confidences = np.take_along_axis(totals, winners, axis=1)[:, 0]
    is_known = is_neighbour.any(axis=1)
    return Recognised(np.where(is_known, landmarks, -1), np.where(is_known, confidences, np.nan))
