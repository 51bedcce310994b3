"""Search in a Milvus collection: a gallery beyond one machine, under the same protocol as every other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from numpy import ndarray

from indexing.index_types import IndexType
from indexing.searching.milvus_collection import MOST_HITS, CollectionFacts, MilvusCollection
from indexing.searching.milvus_expressions import NOTHING, expression_of, selection_expression
from indexing.searching.milvus_layout import VECTOR_FIELD, new_rows
from lookalike.errors import ArtifactError
from lookalike.exact_search import exact_scores, merge_hits, require_searchable
from lookalike.records import Effort, SearchHits, SearchParameters

# Fetched beyond k, so that hits which tie with the k-th are there to be ordered by id.
_MARGIN = 16
# Servers sum in another order than we do: how far two float32 inner products of unit vectors may lie apart.
_SCORE_TOLERANCE = 1e-5
_ANSWER_BYTES = 16 << 20  # of vectors in one answer; servers send up to 64 MiB
_ROWS_PER_REQUEST = 1000
_DEFAULT_BREADTH = 64
_MOST_BREADTH = 32_768  # that Milvus takes
# What unit vectors may be off after they were computed in bfloat16, the coarsest format in use.
_NORM_TOLERANCE = 5e-3


@dataclass(frozen=True, slots=True)
class MilvusSearcher:
    """A `Searcher` with metadata, additions and deletions over one collection.

    Every hit comes with its vector, and its score is computed here, so scores are true inner products whatever codec
    the collection's index has, and equal vectors tie and stand in the order of their ids. Which hits are found depends
    on the index:

    - `Flat`: always the exact k best.
    - `IVF<n>,Flat`: the exact k best where `exact` is asked for (all partitions are visited), else what `effort` or
      the measured recall curve gives. A server may put rows of the last minutes behind an interim index of its own,
      which can miss some of them until they are flushed (`queryNode.segcore.interimIndex.enableIndex: false` ends it).
    - every other: what `effort` or the curve gives; `exact`, and a recall that the curve does not reach, are refused.

    At most 16,384 hits per query can be told from one another: among more vectors of one score, which of them are
    found is up to the server.

    A write is seen by every search that begins after it was acknowledged (consistency level Strong).
    """

    collection: MilvusCollection
    facts: CollectionFacts

    @classmethod
    def open(cls, uri: str, name: str) -> "MilvusSearcher":
        """A collection that `load_into_milvus` filled.

        Raises:
            ArtifactError: there is none of this name, it is not one of ours, or it is not loaded to the end.
            ResourceError: pymilvus is not installed, or nothing answers at `uri`.
        """
        collection = MilvusCollection(uri, name)
        try:
            if not collection.properties().is_loaded:
                raise ArtifactError(
                    f"{collection} holds only a part of its gallery: the load was interrupted. Run "
                    "`lookalike index load-milvus` again with the same options; it continues."
                )
            facts = collection.describe()
            collection.load()
        except BaseException:
            collection.close()
            raise
        return cls(collection, facts)

    def close(self) -> None:
        self.collection.close()

    def __enter__(self) -> "MilvusSearcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_vectors(self) -> int:
        return self.collection.count()

    @property
    def dim(self) -> int:
        return self.facts.dim

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """See `Searcher.search`; exactness is stated at the class.

        Raises:
            ValueError: also where k is above 16,384, or exact search is asked of an index that cannot deliver it.
        """
        require_searchable(queries, dim=self.dim, k=parameters.k)
        if parameters.k > MOST_HITS:
            raise ValueError(f"k must be at most {MOST_HITS:,} in Milvus, got {parameters.k}")
        expression = self._expression_of(parameters)
        effort = self._widened(self._effort_of(parameters), expression)
        found = merge_hits([_no_hits(len(queries))], k=parameters.k)
        open_rows = np.arange(0 if expression == NOTHING else len(queries))
        limit = min(MOST_HITS, max(parameters.k + _MARGIN, parameters.k * effort.candidates_per_hit))
        while len(open_rows):
            settled = self._search_into(found, queries, open_rows, limit, expression, effort)
            open_rows = open_rows[~settled] if limit < MOST_HITS else open_rows[:0]
            limit = min(MOST_HITS, 2 * limit)
        return found

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        rows = self._rows_of(ids, [VECTOR_FIELD])
        return np.array([row[VECTOR_FIELD] for row in rows], np.float32).reshape(len(ids), self.dim)

    def metadata_of(self, ids: Int64[ndarray, "n"]) -> list[dict[str, Any]]:
        """One dictionary per id, column -> value; None for an empty cell.

        Raises:
            KeyError: an id is not here.
        """
        columns = self.facts.properties.columns
        rows = self._rows_of(ids, [column.field for column in columns])
        return [{column.name: row[column.field] for column in columns} for row in rows]

    def ids(self) -> Int64[ndarray, "vectors"]:
        return np.sort(np.array([identifier for batch in self.collection.all_ids() for identifier in batch], np.int64))

    def add(
        self,
        vectors: Float[ndarray, "n vector_dim"],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        ids: Int64[ndarray, "n"],
    ) -> Int64[ndarray, "n"]:
        """New vectors of unit length, seen by the next search; columns that `metadata` lacks stay empty.

        Two programs that add the same id at the same time are not told apart: the later one's vector stays.

        Returns:
            Their ids.

        Raises:
            ValueError: an id is here already, or vectors, ids or metadata do not fit; nothing was added.
        """
        rows = self._new_rows(ids, vectors, metadata)
        known = [identifier for part in _parts(ids) for identifier in self.collection.rows_of(part, [])]
        if known:
            raise ValueError(f"id {min(known)} is in use: replace what it holds, or choose another id")
        self.collection.upsert(rows)
        return ids

    def replace(
        self,
        ids: Int64[ndarray, "n"],
        vectors: Float[ndarray, "n vector_dim"],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Vectors and metadata in place of those that these ids have.

        Raises:
            KeyError: an id is not here; nothing was replaced.
            ValueError: vectors, ids or metadata do not fit; nothing was replaced.
        """
        rows = self._new_rows(ids, vectors, metadata)
        self._rows_of(ids, [])
        self.collection.upsert(rows)

    def delete(self, ids: Int64[ndarray, "n"]) -> None:
        """Raises KeyError for an id that is not here; then nothing is deleted."""
        self._rows_of(ids, [])
        for part in _parts(ids):
            self.collection.delete(part)

    @property
    def _index_type(self) -> IndexType:
        return self.facts.properties.index_type

    def _search_into(
        self,
        found: SearchHits,
        queries: Float32[ndarray, "queries dim"],
        rows: Int64[ndarray, "open"],
        limit: int,
        expression: str,
        effort: Effort,
    ) -> Bool[ndarray, "open"]:
        """Fills in the hits of `rows`, and says which of them more candidates could not change."""
        ours = {"nprobe": effort.num_probes} if effort.num_probes else {}
        if self._index_type.family == "hnsw":
            ours["ef"] = max(limit, effort.breadth or _DEFAULT_BREADTH)
        settled = np.zeros(len(rows), bool)
        step = max(1, _ANSWER_BYTES // (4 * self.dim * limit))
        for start in range(0, len(rows), step):
            of_queries = self.collection.search(queries[rows[start : start + step]], limit, expression, ours)
            for place, hits in enumerate(of_queries, start):
                row = rows[place]
                best = self._scored(queries[row], hits, k=found.ids.shape[1])
                found.ids[row], found.scores[row] = best.ids[0], best.scores[0]
                settled[place] = (
                    len(hits) < limit
                    or self._index_type.codec != "Flat"
                    or hits[-1]["distance"] < best.scores[0, -1] - _SCORE_TOLERANCE * np.linalg.norm(queries[row])
                )
        return settled

    def _scored(self, query: Float32[ndarray, "dim"], hits: Any, *, k: int) -> SearchHits:
        """The k best of some hits, scored from their vectors: one row."""
        ids = np.array([hit["id"] for hit in hits], np.int64)
        vectors = np.array([hit["entity"][VECTOR_FIELD] for hit in hits], np.float32).reshape(len(hits), self.dim)
        scores = exact_scores(np.broadcast_to(query, vectors.shape), vectors)
        return merge_hits([SearchHits(ids[None], scores[None])], k=k)

    def _effort_of(self, parameters: SearchParameters) -> Effort:
        """Raises ValueError where the index cannot deliver what is asked."""
        about = self.facts.properties
        if about.index_type.family == "flat":
            return Effort()
        if not parameters.exact:
            if parameters.effort is not None:
                return parameters.effort
            if parameters.recall is None:
                return about.default_effort or Effort()
            if effort := about.curve.effort_for(parameters.recall):
                return effort
        if about.index_type.family == "ivf" and about.index_type.codec == "Flat":
            return Effort(num_probes=about.index_type.num_partitions)
        wish = "exact search" if parameters.exact else f"a recall of {parameters.recall}"
        measured = max((point.recall for point in about.curve.points), default=None)
        raise ValueError(
            f"{self.collection}: its index {about.index_type.name} does not deliver {wish}"
            + (f"; measured up to {measured}" if measured is not None else "")
            + ". Ask for less, or load the gallery with --type Flat or IVF<partitions>,Flat."
        )

    def _widened(self, effort: Effort, expression: str) -> Effort:
        """As many more partitions or candidates as fewer vectors may be found: so much farther off lie the nearest."""
        family, most_probes = self._index_type.family, self._index_type.num_partitions
        if not expression or family == "flat" or effort.num_probes == most_probes:
            return effort
        share = max(1, self.collection.count(expression)) / max(1, self.num_vectors)
        if family == "ivf":
            return replace(effort, num_probes=min(most_probes, math.ceil((effort.num_probes or 1) / share)))
        return replace(effort, breadth=min(_MOST_BREADTH, math.ceil((effort.breadth or _DEFAULT_BREADTH) / share)))

    def _expression_of(self, parameters: SearchParameters) -> str:
        """Empty where every vector may be found."""
        parts = []
        if parameters.filter is not None:
            columns = {column.name: column for column in self.facts.properties.columns}
            parts.append(expression_of(parameters.filter, columns))
        if parameters.among is not None:
            parts.append(selection_expression(parameters.among))
        if NOTHING in parts:
            return NOTHING
        return " and ".join(f"({part})" for part in parts)

    def _rows_of(self, ids: Int64[ndarray, "n"], fields: list[str]) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for part in _parts(ids):
            found = self.collection.rows_of(part, fields)
            rows += [found[identifier] for identifier in part]  # a KeyError names the id that is not here
        return rows

    def _new_rows(
        self,
        ids: Int64[ndarray, "n"],
        vectors: Float[ndarray, "n vector_dim"],
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> list[dict[str, Any]]:
        """Raises ValueError for what the collection cannot hold."""
        rows = [{}] * len(ids) if metadata is None else metadata
        if vectors.shape[1] != self.dim:
            raise ValueError(f"vectors have length {vectors.shape[1]}, those of the collection {self.dim}")
        if len(rows) != len(ids):
            raise ValueError(f"{len(rows)} rows of metadata for {len(ids)} vectors")
        if len(np.unique(ids)) < len(ids) or (ids < 0).any():
            raise ValueError("ids must be different from each other, and not negative")
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        is_unit = np.abs(lengths - 1) <= _NORM_TOLERANCE  # false for NaN, too
        if not is_unit.all():
            row = int(np.argmin(is_unit))
            raise ValueError(f"vectors must be finite and of unit length, that of row {row} has {lengths[row]:.6g}")
        return new_rows(ids, vectors.astype(np.float32), rows, self.facts.properties.columns)


def _no_hits(num_queries: int) -> SearchHits:
    return SearchHits(np.zeros((num_queries, 0), np.int64), np.zeros((num_queries, 0), np.float32))


def _parts(ids: Int64[ndarray, "n"]) -> list[list[int]]:
    return [ids[start : start + _ROWS_PER_REQUEST].tolist() for start in range(0, len(ids), _ROWS_PER_REQUEST)]
