"""What a report is given besides the result: pictures to look at, curves, and results to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from evaluation.result import Result


@dataclass(frozen=True, slots=True)
class ShownPicture:
    name: str
    kind: Literal["query", "relevant", "junk", "unrelated"]
    jpeg: bytes | None  # its name is shown in its place where None
    score: float | None = None  # similarity to the query


@dataclass(frozen=True, slots=True)
class Gallery:
    """One query: the start of its ranking, the first relevant pictures that stand far behind, and others' rankings."""

    section: str
    query: ShownPicture
    ranking: Sequence[ShownPicture]
    missed: Sequence[ShownPicture] = ()
    rivals: Mapping[str, Sequence[ShownPicture]] = field(default_factory=dict)  # baseline -> start of its ranking


@dataclass(frozen=True, slots=True)
class ConfusingPicture:
    """A picture that stands before relevant ones in the rankings of many queries."""

    picture: ShownPicture
    num_queries: int
    best_position: int  # from 0


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Mean precision at rising recall, both in [0, 1]."""

    section: str
    recall: list[float]
    precision: list[float]


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    result: Result
