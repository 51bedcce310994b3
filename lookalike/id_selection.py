"""Which of a gallery's ids a search may find."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray


@dataclass(frozen=True, slots=True, eq=False)
class IdSelection:
    """The listed ids, or all but them. Made by `only` and `all_but`."""

    ids: Int64[ndarray, "listed"]  # ascending, unique
    excludes: bool  # whether the listed ids are those that must not be found

    @classmethod
    def only(cls, ids: Iterable[int] | Int64[ndarray, "listed"]) -> "IdSelection":
        return cls(_ascending(ids), excludes=False)

    @classmethod
    def all_but(cls, ids: Iterable[int] | Int64[ndarray, "listed"]) -> "IdSelection":
        return cls(_ascending(ids), excludes=True)

    def contains(self, ids: Int64[ndarray, "n"]) -> Bool[ndarray, "n"]:
        """For each of `ids`, in any order, whether it may be found."""
        if not len(self.ids):
            return np.full(len(ids), self.excludes)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return (self.ids[places] == ids) != self.excludes

    def without(self, ids: Int64[ndarray, "n"]) -> "IdSelection":
        """The same selection, from which `ids` are taken out."""
        if self.excludes:
            return IdSelection.all_but(np.union1d(self.ids, ids))
        return IdSelection(self.ids[~np.isin(self.ids, ids)], excludes=False)


def _ascending(ids: Iterable[int] | ndarray) -> Int64[ndarray, "listed"]:
    return np.unique(np.asarray(ids if isinstance(ids, ndarray) else list(ids), np.int64))
