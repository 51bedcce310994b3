"""Pictures for reports: starts of rankings with what is right and wrong in them, and what confuses most queries."""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from PIL import Image

from data_pipelines.decode import DecodeLimits, decode_image
from data_pipelines.shard_set import ShardSet
from evaluation.reporting.values import ConfusingPicture, Gallery, ShownPicture
from lookalike.errors import DataError
from lookalike.records import SearchHits

NUM_GALLERIES = 12
NUM_SHOWN = 10
_NUM_MISSED = 4
_NUM_CONFUSING = 24
_THUMBNAIL_SIDE = 128  # pixels

Kind = Literal["query", "relevant", "junk", "unrelated"]


@dataclass(frozen=True)
class Illustrations:
    """What a report shows beside the numbers."""

    galleries: Sequence[Gallery] = ()
    confusing: Sequence[ConfusingPicture] = ()


@runtime_checkable
class Shelf(Protocol):
    """Gives the pictures of a gallery, or of the queries, by number."""

    def name(self, number: int) -> str: ...

    def jpeg(self, number: int) -> bytes | None:
        """A thumbnail; None where the picture cannot be had."""


@dataclass(frozen=True)
class ShardShelf:
    """Numbers are sample ids, or places in `rows`."""

    shard_set: ShardSet
    rows: Int64[ndarray, "pictures"] | None = None

    def name(self, number: int) -> str:
        sample = self.shard_set.samples.slice(self._row(number), 1).to_pylist()[0]
        return str(sample["class_name"] or sample["key"])

    def jpeg(self, number: int) -> bytes | None:
        return thumbnail(self.shard_set.read_bytes(self._row(number)), limits=self.shard_set.decode_limits)

    def _row(self, number: int) -> int:
        return number if self.rows is None else int(self.rows[number])


@dataclass(frozen=True)
class ShelfBehind:
    """A shelf whose numbers follow those of another one: distractors behind the database."""

    first: Shelf
    num_first: int
    behind: Shelf

    def name(self, number: int) -> str:
        return self.first.name(number) if number < self.num_first else self.behind.name(number - self.num_first)

    def jpeg(self, number: int) -> bytes | None:
        return self.first.jpeg(number) if number < self.num_first else self.behind.jpeg(number - self.num_first)


@dataclass(frozen=True)
class FolderShelf:
    """Files of known names in a folder; without the folder only the names."""

    names: Sequence[str]
    folder: Path | None = None
    crop: Callable[[int, Image.Image], Image.Image] | None = None  # of the picture with this number

    def name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else f"distractor {number - len(self.names):,}"

    def jpeg(self, number: int) -> bytes | None:
        if self.folder is None or number >= len(self.names):
            return None
        path = self.folder / f"{self.names[number]}.jpg"
        if not path.is_file():
            return None
        crop = None if self.crop is None else lambda image: self.crop(number, image)  # type: ignore[misc]
        return thumbnail(path.read_bytes(), limits=DecodeLimits(), crop=crop)


def thumbnail(
    data: bytes, *, limits: DecodeLimits, crop: Callable[[Image.Image], Image.Image] | None = None
) -> bytes | None:
    """A small JPEG; None where the bytes are no picture: a report shows the name in its place."""
    try:
        image = decode_image(data, limits=limits)
    except DataError:
        return None
    image = crop(image) if crop else image
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, format="JPEG", quality=85)
    return encoded.getvalue()


def worst_queries(values: Float64[ndarray, "queries"]) -> Int64[ndarray, "chosen"]:
    """Places of the queries with the least values, worst first."""
    return _ascending(values)[:NUM_GALLERIES]


def spread_queries(values: Float64[ndarray, "queries"]) -> Int64[ndarray, "chosen"]:
    """Places of queries from the best to the worst, evenly spread."""
    order = _ascending(values)
    return order[np.unique(np.linspace(0, len(order) - 1, NUM_GALLERIES).round().astype(int))][::-1]


def _ascending(values: Float64[ndarray, "queries"]) -> Int64[ndarray, "known"]:
    known = np.flatnonzero(~np.isnan(values))
    return known[np.argsort(values[known], kind="stable")]


def gallery_of(
    section: str,
    query: ShownPicture,
    hits: Sequence[tuple[int, float]],
    kind_of: Callable[[int], Kind],
    shelf: Shelf,
    *,
    relevant: Int64[ndarray, "relevant"],
    rivals: Mapping[str, Sequence[tuple[int, float]]] = {},
) -> Gallery:
    """The start of one ranking and the first relevant pictures beyond it.

    Args:
        hits: Numbers on the shelf with their scores, best first; more than are shown.
        relevant: All numbers that count as found.
        rivals: Starts of rankings by others.
    """
    ranking = [_shown(number, kind_of(number), score, shelf) for number, score in hits[:NUM_SHOWN]]
    behind = [(number, score) for number, score in hits[NUM_SHOWN:] if kind_of(number) == "relevant"]
    listed = {number for number, _ in hits}
    unlisted = [(int(number), None) for number in relevant if int(number) not in listed]
    missed = [_shown(number, "relevant", score, shelf) for number, score in [*behind, *unlisted][:_NUM_MISSED]]
    of_rivals = {
        name: [_shown(number, kind_of(number), score, shelf) for number, score in own[:NUM_SHOWN]]
        for name, own in rivals.items()
    }
    return Gallery(section, query, ranking, missed, of_rivals)


def confusing_pictures(
    hits: SearchHits, kind_of: Callable[[int, int], Kind], shelf: Shelf, *, depth: int = NUM_SHOWN
) -> list[ConfusingPicture]:
    """Unrelated pictures that are among the first of the most queries.

    Args:
        kind_of: Of a query's place and a number on the shelf.
    """
    times: Counter[int] = Counter()
    best: dict[int, int] = {}
    for query, ranked in enumerate(hits.ids[:, :depth].tolist()):
        for position, number in enumerate(ranked):
            if number >= 0 and kind_of(query, number) == "unrelated":
                times[number] += 1
                best[number] = min(best.get(number, depth), position)
    # Of equally many, the one that came nearest to a query.
    order = sorted(times, key=lambda number: (-times[number], best[number], number))
    return [
        ConfusingPicture(_shown(number, "unrelated", None, shelf), times[number], best[number])
        for number in order[:_NUM_CONFUSING]
        if times[number] > 1
    ]


def _shown(number: int, kind: Kind, score: float | None, shelf: Shelf) -> ShownPicture:
    return ShownPicture(shelf.name(number), kind, shelf.jpeg(number), score)


def listed_hits(hits: SearchHits, query: int) -> list[tuple[int, float]]:
    """Of one query, without padding."""
    ids, scores = hits.ids[query], hits.scores[query]
    return [(int(number), float(score)) for number, score in zip(ids, scores, strict=True) if number >= 0]
