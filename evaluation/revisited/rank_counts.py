"""Exact ranks by counting: one pass over any number of distractors, no full sort, and counts that add up.

The position of a relevant picture is the number of pictures that score higher. So a query needs the scores of its few
hundred labelled pictures as thresholds, and of everything else only how many lie above each of them. Counts of
blocks, workers and shards are integers and add up to the same result in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from evaluation.revisited.ground_truth import QueryLabels, Setup

# What happens to an unlabelled picture that scores exactly as a labelled one: it stands behind it, in front of it, or
# where its row puts it (distractors come after the database: what a stable sort of the joint scores does).
TieRule = Literal["optimistic", "pessimistic", "index"]


@dataclass(frozen=True)
class DatabaseCounts:
    """Of one query: its labelled pictures, and how many unlabelled ones of the database stand before each of them."""

    scores: Float32[ndarray, "labelled"]
    rows: Int64[ndarray, "labelled"]  # in the database
    num_above: Int64[ndarray, "labelled"]  # unlabelled pictures that score higher
    num_tied: Int64[ndarray, "labelled"]  # unlabelled ones of the same score
    num_tied_before: Int64[ndarray, "labelled"]  # those among them of a smaller row


class RankCounts:
    """Counts of all queries. Starts from the database's scores; distractors are added block by block.

    Distractors are counted in parts, so that the ranks among the first few parts are known as well.
    """

    def __init__(self, queries: Sequence[DatabaseCounts], *, num_parts: int) -> None:
        self.queries = tuple(queries)
        self._bounds = np.cumsum([0, *(len(query.rows) for query in queries)])
        # Labelled pictures of all queries stand side by side.
        self._num_above = np.zeros((num_parts, self._bounds[-1]), np.int64)
        self._num_tied = np.zeros((num_parts, self._bounds[-1]), np.int64)
        self._num_distractors = np.zeros(num_parts, np.int64)

    @classmethod
    def of_database(
        cls, scores: Float32[ndarray, "queries database"], labels: Sequence[QueryLabels], *, num_parts: int = 1
    ) -> "RankCounts":
        """Counts over the database alone.

        Raises:
            ValueError: a score is not finite, or there are more or fewer rows of scores than labelled queries.
        """
        if len(scores) != len(labels):
            raise ValueError(f"{len(scores)} rows of scores for {len(labels)} queries")
        if not np.isfinite(scores).all():
            raise ValueError("the scores of the database hold NaN or infinity")
        queries = [_count_database(row, label.labelled()) for row, label in zip(scores, labels, strict=True)]
        return cls(queries, num_parts=num_parts)

    @property
    def num_distractors(self) -> int:
        return int(self._num_distractors.sum())

    def add_distractors(self, scores: Float32[ndarray, "queries block"], *, part: int = 0) -> None:
        """Adds pictures that are relevant to nobody.

        Raises:
            ValueError: a score is not finite.
        """
        if not scores.shape[1]:
            return
        # A block is sorted, and the few thresholds are looked up in it: less work than placing each score among the
        # thresholds. NaN is sorted behind infinity, so the ends tell whether all is finite.
        ascending = np.sort(scores, axis=1)
        if not np.isfinite(ascending[:, [0, -1]]).all():
            raise ValueError("the scores of distractors hold NaN or infinity")
        for number, (query, row) in enumerate(zip(self.queries, ascending, strict=True)):
            own = slice(self._bounds[number], self._bounds[number + 1])
            num_below, num_not_above = (row.searchsorted(query.scores, side) for side in ("left", "right"))
            self._num_above[part, own] += len(row) - num_not_above
            self._num_tied[part, own] += num_not_above - num_below
        self._num_distractors[part] += scores.shape[1]

    def state(self) -> dict[str, ndarray]:
        """The distractors' part, as the very arrays that count: to store, to send, to sum in place."""
        return {
            "num_above": self._num_above,
            "num_tied": self._num_tied,
            "num_distractors": self._num_distractors,
        }

    def load_state(self, state: Mapping[str, ndarray]) -> None:
        """Replaces the counts by stored ones of the same queries and parts."""
        for name, own in self.state().items():
            own[...] = state[name]

    def positions(
        self, labels: Sequence[QueryLabels], setup: Setup, *, ties: TieRule, num_parts: int | None = None
    ) -> list[Int64[ndarray, "relevant"]]:
        """Positions from 0, ascending, of each query's relevant pictures in its ranking without ignored ones.

        Args:
            num_parts: Ranks among the database and this many parts of the distractors; all where None.
        """
        num_above = self._num_above[:num_parts].sum(axis=0)
        num_tied = self._num_tied[:num_parts].sum(axis=0)
        own = [slice(start, end) for start, end in pairwise(self._bounds)]
        return [
            _positions(query, num_above[part], num_tied[part], label.is_relevant(setup), ties)
            for query, part, label in zip(self.queries, own, labels, strict=True)
        ]


def _positions(
    query: DatabaseCounts,
    distractors_above: Int64[ndarray, "labelled"],
    distractors_tied: Int64[ndarray, "labelled"],
    is_relevant: Bool[ndarray, "labelled"],
    ties: TieRule,
) -> Int64[ndarray, "relevant"]:
    before = query.num_above + distractors_above
    if ties == "index":  # a distractor's row is greater than all of the database
        before = before + query.num_tied_before
    elif ties == "pessimistic":
        before = before + query.num_tied + distractors_tied
    order = np.lexsort((query.rows, -query.scores))
    order = order[is_relevant[order]]
    return before[order] + np.arange(len(order))


def _count_database(scores: Float32[ndarray, "database"], rows: Int64[ndarray, "labelled"]) -> DatabaseCounts:
    is_unlabelled = np.ones(len(scores), bool)
    is_unlabelled[rows] = False
    others = np.flatnonzero(is_unlabelled)
    ascending = np.sort(scores[others])
    own = scores[rows]
    num_below, num_not_above = (ascending.searchsorted(own, side) for side in ("left", "right"))
    num_tied = (num_not_above - num_below).astype(np.int64)
    tied_before = np.zeros(len(rows), np.int64)
    for place in np.flatnonzero(num_tied):
        tied_before[place] = (scores[others[others < rows[place]]] == own[place]).sum()
    return DatabaseCounts(own, rows, (len(others) - num_not_above).astype(np.int64), num_tied, tied_before)
