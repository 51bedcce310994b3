"""What changes make of a version: vectors added or replaced since, and ids of the version that no longer count."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from indexing.living.journal import Change
from indexing.searching.exact import ExactSearcher
from indexing.searching.filtering import matching_rows
from indexing.searching.screening import NormBounds, measure_norms
from indexing.vector_store import VectorStore
from lookalike.id_selection import IdSelection
from lookalike.records import SearchHits, SearchParameters

_NO_IDS = np.zeros(0, np.int64)
_LEAST_CAPACITY = 64
# Slots of replaced and deleted vectors are given back when they are this many and more than the living ones.
_DEAD_SLOTS_KEPT = 1000


class Delta:
    """Never changes: `after` gives the next one, which shares what stayed the same.

    Vectors and metadata lie in slots that are only ever appended, with room to spare, so that n additions one by one
    cost n copies of a vector and not n^2.
    """

    def __init__(
        self,
        base: VectorStore,
        schema: pa.Schema,
        *,
        slots: "_Slots | None" = None,
        ids: Int64[ndarray, "added"] = _NO_IDS,
        slot_of_row: Int64[ndarray, "added"] = _NO_IDS,
        hidden: Int64[ndarray, "hidden"] = _NO_IDS,
    ) -> None:
        self._base, self._schema = base, schema
        self._slots = slots or _Slots(base.dim, schema)
        self.ids = ids  # of added and replacing vectors, ascending
        self._slot_of_row = slot_of_row
        self.hidden = hidden  # ids of the base that were replaced or deleted, ascending
        self._norms = self._slots.norms
        # One object for all searches, so that what a searcher makes of it can be kept.
        self._visible = IdSelection(hidden, excludes=True)

    @property
    def num_vectors(self) -> int:
        return len(self.ids)

    def after(self, changes: Sequence[Change]) -> "Delta":
        """This delta and `changes`, in their order.

        Raises:
            ValueError: a vector's dimension or metadata do not fit the base.
        """
        last_of_id = {change.id: change for change in changes}
        if not last_of_id:
            return self
        touched = np.fromiter(sorted(last_of_id), np.int64, len(last_of_id))
        put = [change for change in last_of_id.values() if change.vector is not None]
        put.sort(key=lambda change: change.id)
        kept = ~is_among(self.ids, touched)
        ids, slot_of_row = self.ids[kept], self._slot_of_row[kept]
        slots, slot_of_row = self._slots.without_dead(slot_of_row)
        slots = slots.with_rows([_fitting_vector(change, self._base.dim) for change in put], [c.metadata for c in put])
        put_ids = np.fromiter((change.id for change in put), np.int64, len(put))
        places = np.searchsorted(ids, put_ids)
        newly_hidden = touched[is_among(touched, self._base.ids) & ~is_among(touched, self.hidden)]
        return Delta(
            self._base,
            self._schema,
            slots=slots,
            ids=np.insert(ids, places, put_ids),
            slot_of_row=np.insert(slot_of_row, places, np.arange(slots.used - len(put), slots.used)),
            hidden=np.insert(self.hidden, np.searchsorted(self.hidden, newly_hidden), newly_hidden),
        )

    def visible_in_base(self, among: IdSelection | None) -> IdSelection | None:
        """What of `among` the base may still find."""
        if not len(self.hidden):
            return among
        return self._visible if among is None else among.without(self.hidden)

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """Exact, whatever effort the parameters ask for."""
        among = parameters.among
        if parameters.filter is not None:
            fitting = matching_rows(parameters.filter, self.metadata)
            if among is not None:
                fitting = fitting & among.contains(self.ids)
            among = IdSelection.only(self.ids[fitting])
        return self._searcher.search(queries, SearchParameters(k=parameters.k, exact=True, among=among))

    def holds(self, ids: Int64[ndarray, "n"]) -> Bool[ndarray, "n"]:
        return is_among(ids, self.ids)

    def base_holds(self, ids: Int64[ndarray, "n"]) -> Bool[ndarray, "n"]:
        """Whether the base has an id that still counts."""
        return is_among(ids, self._base.ids) & ~is_among(ids, self.hidden)

    @cached_property
    def store(self) -> VectorStore:
        """The added vectors; a view of them where they were added in the order of their ids."""
        return VectorStore(self._slots.vectors_in(self._slot_of_row), self.ids)

    @cached_property
    def metadata(self) -> pa.Table:
        """One row for each of `ids`, with the columns of the base."""
        return self._slots.metadata_in(self._slot_of_row)

    @cached_property
    def _searcher(self) -> ExactSearcher:
        searcher = ExactSearcher(self.store)
        searcher.norms = self._norms  # or each change would cost a pass over all additions
        return searcher


def is_among(ids: Int64[ndarray, "n"], ascending: Int64[ndarray, "m"]) -> Bool[ndarray, "n"]:
    """For each of `ids`, whether it is one of the `ascending` ones."""
    if not len(ascending):
        return np.zeros(len(ids), bool)
    places = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
    return np.asarray(ascending[places] == ids)


def metadata_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of the base's columns; a column that a row does not name is empty there.

    Raises:
        ValueError: a row names a column that the base does not have, or holds a value of another type.
    """
    unknown = sorted({name for row in rows for name in row} - set(schema.names))
    if unknown:
        known = ", ".join(schema.names) or "none"
        raise ValueError(f"metadata has no column {unknown[0]!r}; the columns of this index are: {known}")
    columns = [_column([row.get(field.name) for row in rows], field) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    # JSON has no dates: what is none of its own types is spelled, and read here.
    given = [value for value in values if value is not None]
    is_spelled = bool(given) and not pa.types.is_string(field.type) and all(isinstance(value, str) for value in given)
    try:
        return pa.array(values, pa.string()).cast(field.type) if is_spelled else pa.array(values, field.type)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"metadata column {field.name!r} holds values of type {field.type}: {error}") from None


class _Slots:
    """Vectors and metadata rows, appended; several deltas share one, each knows which slots are its own."""

    def __init__(self, dim: int, schema: pa.Schema) -> None:
        self._vectors = np.empty((_LEAST_CAPACITY, dim), np.float32)
        self._schema = schema
        self._tables: list[pa.Table] = []
        self.norms = NormBounds(0.0, 0.0)  # of all vectors that ever were here
        self.used = 0

    def with_rows(self, vectors: list[Float32[ndarray, "dim"]], metadata: list[Mapping[str, Any]]) -> "_Slots":
        """Appends; the caller's delta is the newest one, so that the slots after `used` are nobody's."""
        if not vectors:
            return self
        table = metadata_table(metadata, self._schema)
        needed = self.used + len(vectors)
        if needed > len(self._vectors):
            larger = np.empty((max(needed, 2 * len(self._vectors)), self._vectors.shape[1]), np.float32)
            larger[: self.used] = self._vectors[: self.used]
            self._vectors = larger  # deltas before this one keep the array they look at
        self._vectors[self.used : needed] = vectors
        added = measure_norms(self._vectors[self.used : needed])
        self.norms = NormBounds(
            max(self.norms.largest, added.largest), max(self.norms.largest_lost, added.largest_lost)
        )
        self.used = needed
        # Like digits of a binary counter: each row is copied log n times, and there are never many tables.
        tables = [*self._tables, table]
        while len(tables) > 1 and tables[-1].num_rows >= tables[-2].num_rows:
            tables[-2:] = [pa.concat_tables(tables[-2:]).combine_chunks()]
        self._tables = tables
        return self

    def without_dead(self, living: Int64[ndarray, "rows"]) -> tuple["_Slots", Int64[ndarray, "rows"]]:
        """These slots, or where most are dead new ones with the living only; and where the living now are."""
        if self.used - len(living) <= max(_DEAD_SLOTS_KEPT, len(living)):
            return self, living
        fresh = _Slots(self._vectors.shape[1], self._schema)
        fresh._vectors = self._vectors[living]
        fresh._tables = [self.metadata_in(living)] if len(living) else []
        fresh.norms = self.norms
        fresh.used = len(living)
        return fresh, np.arange(len(living))

    def vectors_in(self, slots: Int64[ndarray, "rows"]) -> Float32[ndarray, "rows dim"]:
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
            return self._vectors[slots[0] : slots[-1] + 1]
        return self._vectors[slots]

    def metadata_in(self, slots: Int64[ndarray, "rows"]) -> pa.Table:
        table = pa.concat_tables(self._tables) if self._tables else self._schema.empty_table()
        return table.take(pa.array(slots)).combine_chunks()


def _fitting_vector(change: Change, dim: int) -> Float32[ndarray, "dim"]:
    assert change.vector is not None
    if len(change.vector) != dim:
        raise ValueError(f"the vector of id {change.id} has length {len(change.vector)}, those of the index {dim}")
    return change.vector
