"""Exact ranks by counting: one pass over any number of distractors, no sort, and counts that add up.

The position of a relevant picture is the number of pictures that score higher. So a query needs the scores of its few
hundred labelled pictures as thresholds, and of everything else only how many lie above each of them. Counts of
blocks, workers and shards are integers and add up to the same result in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from evaluation.revisited.ground_truth import QueryLabels, Setup

# What happens to an unlabelled picture that scores exactly as a labelled one: it stands behind it, in front of it, or
# where its row puts it (distractors come after the database: what a stable sort of the joint scores does).
TieRule = Literal["optimistic", "pessimistic", "index"]


@dataclass
class QueryCounts:
    """Of one query: labelled pictures, and how many unlabelled ones stand before each of them."""

    scores: Float32[ndarray, "labelled"]
    rows: Int64[ndarray, "labelled"]  # in the database
    num_above: Int64[ndarray, "labelled"]  # unlabelled pictures that score higher
    num_tied_before: Int64[ndarray, "labelled"]  # unlabelled ones of the same score and a smaller row
    num_tied: Int64[ndarray, "labelled"]  # unlabelled ones of the same score

    def positions(self, is_relevant: ndarray, *, ties: TieRule) -> Int64[ndarray, "relevant"]:
        """Positions from 0, ascending, of the relevant pictures among themselves and the unlabelled ones."""
        order = np.lexsort((self.rows, -self.scores))
        order = order[is_relevant[order]]
        before = self.num_above[order]
        if ties == "index":
            before = before + self.num_tied_before[order]
        elif ties == "pessimistic":
            before = before + self.num_tied[order]
        return before + np.arange(len(order))


class RankCounts:
    """Counts of all queries. Starts from the database's scores; distractors are added block by block."""

    def __init__(self, queries: Sequence[QueryCounts]) -> None:
        self.queries = list(queries)
        self.num_distractors = 0

    @classmethod
    def of_database(cls, scores: Float32[ndarray, "queries database"], labels: Sequence[QueryLabels]) -> "RankCounts":
        """Counts over the database alone.

        Raises:
            ValueError: a score is not finite, or there are more or fewer rows of scores than labelled queries.
        """
        if len(scores) != len(labels):
            raise ValueError(f"{len(scores)} rows of scores for {len(labels)} queries")
        if not np.isfinite(scores).all():
            raise ValueError("the scores of the database hold NaN or infinity")
        return cls([_count_database(row, label.labelled()) for row, label in zip(scores, labels, strict=True)])

    def add_distractors(self, scores: Float32[ndarray, "queries block"]) -> None:
        """Adds pictures that are relevant to nobody.

        Raises:
            ValueError: a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise ValueError("the scores of distractors hold NaN or infinity")
        for query, row in zip(self.queries, scores, strict=True):
            above, tied = _count_above_and_tied(query.scores, row)
            query.num_above += above
            query.num_tied += tied
        self.num_distractors += scores.shape[1]

    def state(self) -> dict[str, ndarray]:
        """The distractors' part, as plain arrays: to store, to send, to add up."""
        return {
            "num_above": np.concatenate([query.num_above for query in self.queries]),
            "num_tied": np.concatenate([query.num_tied for query in self.queries]),
            "num_distractors": np.array(self.num_distractors),
        }

    def load_state(self, state: dict[str, ndarray]) -> None:
        """Replaces the counts by stored ones of the same queries."""
        bounds = np.cumsum([len(query.rows) for query in self.queries])[:-1]
        above, tied = np.split(state["num_above"], bounds), np.split(state["num_tied"], bounds)
        for query, own_above, own_tied in zip(self.queries, above, tied, strict=True):
            query.num_above, query.num_tied = own_above.copy(), own_tied.copy()
        self.num_distractors = int(state["num_distractors"])

    def positions(
        self, labels: Sequence[QueryLabels], setup: Setup, *, ties: TieRule
    ) -> list[Int64[ndarray, "relevant"]]:
        return [
            query.positions(label.is_relevant(setup), ties=ties)
            for query, label in zip(self.queries, labels, strict=True)
        ]


def _count_database(scores: Float32[ndarray, "database"], rows: Int64[ndarray, "labelled"]) -> QueryCounts:
    is_unlabelled = np.ones(len(scores), bool)
    is_unlabelled[rows] = False
    others = np.flatnonzero(is_unlabelled)
    above, tied = _count_above_and_tied(scores[rows], scores[others])
    tied_before = np.zeros(len(rows), np.int64)
    for place in np.flatnonzero(tied):
        tied_before[place] = (scores[others[others < rows[place]]] == scores[rows[place]]).sum()
    return QueryCounts(scores[rows], rows, above, tied_before, tied)


def _count_above_and_tied(
    thresholds: Float32[ndarray, "labelled"], scores: Float32[ndarray, "block"]
) -> tuple[Int64[ndarray, "labelled"], Int64[ndarray, "labelled"]]:
    """How many of `scores` are greater than each threshold, and how many are equal to it."""
    values, members = np.unique(thresholds, return_inverse=True)
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    candidates = scores[scores >= values[0]]
    places = np.searchsorted(values, candidates, side="left")  # number of thresholds below each candidate
    is_tied = values[np.minimum(places, len(values) - 1)] == candidates
    histogram = np.bincount(places, minlength=len(values) + 1)
    num_above = histogram[::-1].cumsum()[::-1][1:]
    num_tied = np.bincount(places[is_tied], minlength=len(values))
    return num_above[members].astype(np.int64), num_tied[members].astype(np.int64)
