"""What a live index holds at one moment: a version and the changes after it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from indexing.living.delta import Delta
from indexing.living.journal import ChangesRead
from indexing.published_index import PublishedIndex
from indexing.versions import absorbed_sequence
from lookalike.errors import ManifestMismatch
from lookalike.exact_search import merge_hits
from lookalike.records import SearchHits, SearchParameters


@dataclass(frozen=True, slots=True, eq=False)
class LiveView:
    """A `Searcher` that never changes; keep one to search and then look up what was found."""

    base: PublishedIndex
    delta: Delta
    sequence: int  # number of the last change that is in it

    @classmethod
    def of(cls, base: PublishedIndex) -> "LiveView":
        """A version as it was built."""
        return cls(base, Delta(base.store, base.metadata.schema), absorbed_sequence(base.manifest.details))

    def after(self, read: ChangesRead) -> "LiveView":
        """This view and changes read from the journal after its `sequence`.

        Raises:
            ManifestMismatch: a change does not fit the version.
        """
        try:
            delta = self.delta.after(read.changes)
        except ValueError as error:
            raise ManifestMismatch(
                f"version {self.base.folder} does not go with the changes in its journal: {error}. Publish a version "
                "of the collection that they were made for."
            ) from error
        return LiveView(self.base, delta, max(self.sequence, read.last_sequence))

    @property
    def num_vectors(self) -> int:
        return self.base.num_vectors - len(self.delta.hidden) + self.delta.num_vectors

    @property
    def dim(self) -> int:
        return self.base.dim

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher`; changes since the version are searched exactly, whatever effort is asked for."""
        among = self.delta.visible_in_base(parameters.among)
        in_base = parameters if among is parameters.among else replace(parameters, among=among)
        hits = self.base.search(queries, in_base)
        if not self.delta.num_vectors:
            return hits
        return merge_hits([hits, self.delta.search(queries, parameters)], k=parameters.k)

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """Raises KeyError for an id that is not here."""
        self.require(ids)
        is_added = self.delta.holds(ids)
        vectors = np.empty((len(ids), self.dim), np.float32)
        vectors[is_added] = self.delta.store.vectors_of(ids[is_added])
        vectors[~is_added] = self.base.vectors_of(ids[~is_added])
        return vectors

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> list[dict[str, Any]]:
        """One row per id, in their order; KeyError for an id that is not here."""
        self.require(ids)
        is_added = self.delta.holds(ids)
        added_rows = pa.array(np.searchsorted(self.delta.ids, ids[is_added]))
        added = iter(self.delta.metadata.take(added_rows).to_pylist() if is_added.any() else ())
        rest = iter(self.base.metadata_of(ids[~is_added]))
        return [next(added) if here else next(rest) for here in is_added]

    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids, ascending."""
        kept = np.setdiff1d(self.base.ids(), self.delta.hidden, assume_unique=True)
        return np.union1d(kept, self.delta.ids)

    def holds(self, ids: Int64[ndarray, "n"]) -> Bool[ndarray, "n"]:
        """For each of `ids`, whether it is here."""
        return self.delta.holds(ids) | self.delta.base_holds(ids)

    def require(self, ids: Int64[ndarray, "n"]) -> None:
        """Raises KeyError for an id that is not here."""
        is_here = self.holds(ids)
        if not is_here.all():
            raise KeyError(int(ids[~is_here][0]))
