"""Searches of many requests, together where they ask the same of the same moment of the index."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from lookalike.errors import LookalikeError
from lookalike.id_selection import IdSelection
from lookalike.records import SearchHits, SearchParameters
from serving.engine.errors import UnknownItemError, UnsearchableFilterError
from serving.engine.queries import QueryPart
from serving.engine.served_index import Served
from serving.engine.vectors_of_queries import combined, unit_vector

# Of more ids than this, leaving them out is left to the index: it costs less than so many more hits.
_MOST_EXTRA_HITS = 64


@dataclass(frozen=True, slots=True, eq=False)
class SearchJob:
    """A query whose pictures have become vectors; made by `of`."""

    served: Served
    parts: Sequence[QueryPart]
    of_pictures: Sequence[Float32[ndarray, "dim"] | None]  # for each part its vector, where it is a picture
    k: int
    left_out: Sequence[int]  # ids that must not be found, though the index is not told
    asked: SearchParameters  # what the index is told
    describe: Callable[[SearchHits], Any] | None  # what is to be made of the hits, while a thread is at it

    @classmethod
    def of(
        cls,
        served: Served,
        parts: Sequence[QueryPart],
        of_pictures: Sequence[Float32[ndarray, "dim"] | None],
        parameters: SearchParameters,
        *,
        left_out: Sequence[int],
        describe: Callable[[SearchHits], Any] | None = None,
    ) -> "SearchJob":
        """
        Args:
            left_out: Ids that must not be found. Of few, that many more hits are asked for, so that searches that
                differ in them alone can be done together.
        """
        if len(left_out) <= _MOST_EXTRA_HITS and parameters.among is None:
            asked = replace(parameters, k=parameters.k + len(left_out))
            return cls(served, parts, of_pictures, parameters.k, left_out, asked, describe)
        asked = replace(parameters, among=among_others(parameters.among, left_out))
        return cls(served, parts, of_pictures, parameters.k, (), asked, describe)

    @property
    def is_exact(self) -> bool:
        """Whether every vector is compared: then many queries cost little more than one."""
        return self.asked.exact or self.served.view.base.type.family == "flat"


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a job came to."""

    vector: Float32[ndarray, "1 dim"]
    hits: SearchHits  # of one query
    described: Any  # what `describe` made of the hits; None where there is none
    search_seconds: float  # of the whole batch
    describe_seconds: float


def among_others(among: IdSelection | None, left_out: Sequence[int]) -> IdSelection:
    """`among`, or everything, without some ids."""
    return (among or IdSelection.all_but([])).without(np.array(left_out, np.int64))


def key_of(job: SearchJob) -> Hashable:
    """Equal where one search can answer both."""
    asked = job.asked
    # Exact hits of few are the first of many; approximate ones may depend on k.
    k = None if job.is_exact else asked.k
    # By its spelling, too: for Python, a condition on 1 equals one on True.
    condition = None if asked.filter is None else repr(asked.filter)
    return id(job.served.view), k, asked.exact, asked.effort, asked.recall, condition, id(asked.among)


def search_together(jobs: Sequence[SearchJob]) -> list[Found | Exception]:
    """Jobs of one key; what is wrong with one of them is its own error."""
    outcomes: list[Found | Exception | None] = [None] * len(jobs)
    vectors: list[ndarray] = []
    places: list[int] = []
    for place, job in enumerate(jobs):
        try:
            vectors.append(_vector_of(job))
            places.append(place)
        except LookalikeError as error:
            outcomes[place] = error
    if vectors:
        first = jobs[places[0]]
        depth = max(jobs[place].asked.k for place in places)
        started = time.perf_counter()
        hits = _search(first.served, np.stack(vectors), replace(first.asked, k=depth))
        seconds = time.perf_counter() - started
        for row, place in enumerate(places):
            own = _without(hits.ids[row], hits.scores[row], jobs[place])
            outcomes[place] = _found(jobs[place], vectors[row], own, seconds)
    return [outcome for outcome in outcomes if outcome is not None]


def _found(job: SearchJob, vector: Float32[ndarray, "dim"], hits: SearchHits, seconds: float) -> Found | Exception:
    started = time.perf_counter()
    try:
        described = None if job.describe is None else job.describe(hits)
    except Exception as error:
        return error
    return Found(vector[None], hits, described, seconds, time.perf_counter() - started)


def _vector_of(job: SearchJob) -> Float32[ndarray, "dim"]:
    view = job.served.view
    vectors = []
    for part, of_picture in zip(job.parts, job.of_pictures, strict=True):
        if of_picture is not None:
            vectors.append(of_picture)
        elif part.vector is not None:
            vectors.append(unit_vector(part.vector, dim=view.dim))
        else:
            try:
                vectors.append(view.vectors_of(np.array([part.id], np.int64))[0])
            except KeyError:
                raise UnknownItemError(f"index {job.served.index_version} holds no picture with id {part.id}") from None
    return combined(vectors, [part.weight for part in job.parts])


def _search(served: Served, vectors: Float32[ndarray, "queries dim"], parameters: SearchParameters) -> SearchHits:
    try:
        return served.view.search(vectors, parameters)
    except ValueError as error:
        # Vectors are checked before, so it is the filter: a column is unknown, or of another type.
        if parameters.filter is None:
            raise
        raise UnsearchableFilterError(str(error)) from error


def _without(ids: Int64[ndarray, "depth"], scores: Float32[ndarray, "depth"], job: SearchJob) -> SearchHits:
    """The first k hits that are not to be left out."""
    kept = ids >= 0
    if job.left_out:
        kept &= ~np.isin(ids, job.left_out)
    return SearchHits(ids[kept][: job.k][None], scores[kept][: job.k][None])
