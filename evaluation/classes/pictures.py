"""Pictures to judge: vectors, ids and classes, checked once, and which of a gallery answer which query."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from numpy import ndarray

from lookalike.errors import DataError

_ROWS_AT_A_TIME = 4096
_NAMED = 5  # pictures that a message names
_LONGEST = 1e18  # length of a vector; no part of a score can then leave float32 (Cauchy-Schwarz)


@dataclass(frozen=True)
class Pictures:
    """Rows of a matrix that may be memory-mapped; nothing is read before it is asked for."""

    vectors: Float[ndarray, "rows dim"]
    rows: Int64[ndarray, "pictures"]  # of `vectors`, ascending
    ids: Int64[ndarray, "pictures"]
    labels: Int64[ndarray, "pictures"]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def take(self, places: Int64[ndarray, "chosen"]) -> "Pictures":
        """Those at ascending `places`; the matrix is shared."""
        names = [self.names[place] for place in places.tolist()]
        return Pictures(self.vectors, self.rows[places], self.ids[places], self.labels[places], names)

    def vector(self, place: int) -> Float32[ndarray, "dim"]:
        vector: ndarray = self.vectors[self.rows[place]].astype(np.float32)
        return vector

    def largest_norm(self) -> float:
        """Of the vectors as float32; reads them all."""
        starts = range(0, len(self), _ROWS_AT_A_TIME)
        return max(float(_norms(self.vectors[self.rows[start : start + _ROWS_AT_A_TIME]]).max()) for start in starts)

    def padded_block(
        self, start: int, buffer: Float32[ndarray, "block dim"]
    ) -> tuple[Float32[ndarray, "block dim"], int]:
        """As many vectors from `start` as `buffer` has rows, zeros where the pictures end, and how many are pictures.

        The block is a view of the matrix where that will do, else it is `buffer`.
        """
        rows = self.rows[start : start + len(buffer)]
        is_run = rows[-1] - rows[0] == len(rows) - 1
        block = self.vectors[rows[0] : rows[-1] + 1] if is_run else self.vectors[rows]
        if len(rows) == len(buffer) and block.dtype == np.float32 and block.flags.c_contiguous:
            return block, len(rows)
        if block.dtype == np.float16:  # torch converts it eight times as fast as numpy
            torch.from_numpy(buffer[: len(rows)]).copy_(torch.from_numpy(np.array(block)))
        else:
            buffer[: len(rows)] = block
        buffer[len(rows) :] = 0
        return buffer, len(rows)


def checked_pictures(
    what: str, vectors: ndarray, ids: ndarray, labels: ndarray, names: Sequence[str] | None = None
) -> Pictures:
    """Reads all vectors once.

    Args:
        what: What a message calls them.
        vectors: Rows of floats of any width.
        ids: Whole numbers from 0, unique.
        labels: Class of each picture, a whole number from 0.
        names: How results call them; ids as text where None.

    Raises:
        DataError: shapes or types do not fit, an id is there twice, a picture has no class, or a vector is not finite
            or so long that a score could overflow. The message names pictures.
    """
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise DataError(f"{what}: expected rows of floats, found {vectors.dtype} of shape {vectors.shape}.")
    own_ids, own_labels = checked_classes(what, ids, labels)
    if len(own_ids) != len(vectors) or (names is not None and len(names) != len(vectors)):
        num_names = "" if names is None else f" and {len(names)} names"
        raise DataError(f"{what}: {len(vectors)} vectors, but {len(own_ids)} ids{num_names}.")
    own_names = [str(own) for own in own_ids.tolist()] if names is None else list(names)
    pictures = Pictures(vectors, np.arange(len(vectors)), own_ids, own_labels, own_names)
    _require_finite_scores(what, pictures)
    return pictures


def checked_classes(
    what: str, ids: ndarray, labels: ndarray
) -> tuple[Int64[ndarray, "pictures"], Int64[ndarray, "pictures"]]:
    """Ids and labels in 64 bits; raises DataError as `checked_pictures` does."""
    for name, values in (("ids", ids), ("labels", labels)):
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"{what}: {name} must be whole numbers, found {values.dtype} of shape {values.shape}.")
    if len(ids) != len(labels):
        raise DataError(f"{what}: {len(ids)} ids, but {len(labels)} labels.")
    if not len(ids):
        raise DataError(f"{what}: there are no pictures.")
    if (ids < 0).any():
        raise DataError(f"{what}: ids must not be negative, found {listed(ids[ids < 0])}.")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{what}: every id must be there once; more often: {listed(values[counts > 1])}.")
    if (labels < 0).any():
        raise DataError(
            f"{what}: {int((labels < 0).sum())} pictures have no class, so their answers cannot be judged: "
            f"ids {listed(ids[labels < 0])}."
        )
    return ids.astype(np.int64), labels.astype(np.int64)


def have_company(labels: Int64[ndarray, "pictures"]) -> Bool[ndarray, "pictures"]:
    """Whether another picture has the same class: one that is alone cannot be found, and is no query."""
    _, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray((sizes[members] > 1) & (labels >= 0))


def listed(values: Sequence[object] | ndarray) -> str:
    """The first few, and how many more."""
    shown = ", ".join(str(value) for value in values[:_NAMED])
    return shown + (f" and {len(values) - _NAMED} more" if len(values) > _NAMED else "")


class RelevantRows:
    """The places in the gallery of the pictures of each query's class, without the query itself."""

    def __init__(
        self,
        gallery_ids: Int64[ndarray, "gallery"],
        gallery_labels: Int64[ndarray, "gallery"],
        query_ids: Int64[ndarray, "queries"],
        query_labels: Int64[ndarray, "queries"],
    ) -> None:
        by_id = np.argsort(gallery_ids)
        places = np.minimum(np.searchsorted(gallery_ids, query_ids, sorter=by_id), len(gallery_ids) - 1)
        own = by_id[places]
        # Place of the query itself, which is removed by id wherever it stands; -1 where the gallery lacks it.
        self.own: Int64[ndarray, queries] = np.where(gallery_ids[own] == query_ids, own, -1)
        self._by_label = np.argsort(gallery_labels, kind="stable")
        ordered = gallery_labels[self._by_label]
        self._starts = np.searchsorted(ordered, query_labels, side="left")
        self._ends = np.searchsorted(ordered, query_labels, side="right")
        is_own_relevant = (self.own >= 0) & (gallery_labels[self.own] == query_labels)
        self.counts: Int64[ndarray, queries] = self._ends - self._starts - is_own_relevant

    def __getitem__(self, query: int) -> Int64[ndarray, "relevant"]:
        rows = self._by_label[self._starts[query] : self._ends[query]]
        return rows[rows != self.own[query]]


def _require_finite_scores(what: str, pictures: Pictures) -> None:
    starts = range(0, len(pictures), _ROWS_AT_A_TIME)
    norms = np.concatenate([_norms(pictures.vectors[start : start + _ROWS_AT_A_TIME]) for start in starts])
    is_bad = ~np.isfinite(norms)
    if is_bad.any():
        names = [pictures.names[place] for place in np.flatnonzero(is_bad).tolist()]
        raise DataError(f"{what}: {len(names)} vectors hold NaN or infinity: {listed(names)}.")
    if norms.max() > _LONGEST:
        name = pictures.names[int(norms.argmax())]
        raise DataError(f"{what}: the vector of {name} has length {norms.max():.2g}; scores would overflow.")


def _norms(vectors: Float[ndarray, "block dim"]) -> Float64[ndarray, "block"]:
    """As float32 will have them; in float64, so that their squares are finite."""
    with np.errstate(over="ignore"):
        return np.asarray(np.linalg.norm(vectors.astype(np.float32).astype(np.float64), axis=1))
