"""How a gallery lies in a Milvus collection.

One row per vector: the primary key `id`, the float32 `vector` under an index of inner products, and one nullable field
per column of metadata. What Milvus does not know of it stands in the collection's properties.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.index_types import IndexType
from indexing.searching.milvus_expressions import ID_FIELD, IN_WORDS, INT64, Column, ColumnKind
from indexing.searching.recall_curve import RecallCurve, effort_to_tree
from lookalike.errors import ArtifactError, DataError, SettingsError
from lookalike.records import Effort

VECTOR_FIELD = "vector"
KEY_COLUMN = "key"
MAX_TEXT_BYTES = 65_535  # of a text cell
_PROPERTY = "lookalike.gallery"
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
# Words of Milvus's expressions (its grammar knows them in any case); a column of such a name gets another field.
_RESERVED = frozenset(
    "and or not in like exists is null true false iso interval array_contains array_contains_all array_contains_any "
    "array_length contains contains_all contains_any json_contains json_contains_all json_contains_any text_match "
    "phrase_match random_sample element_filter match_all match_any match_least match_most match_exact threshold "
    "minimum_should_match st_equals st_touches st_overlaps st_crosses st_contains st_intersects st_within st_dwithin "
    "st_isvalid "
    f"{ID_FIELD} {VECTOR_FIELD}".split()
)


@dataclass(frozen=True, slots=True)
class GalleryProperties:
    """What stands in a collection's properties beside Milvus's own."""

    source: str  # fingerprint of what it was loaded from
    index_type: IndexType
    is_loaded: bool  # whether all of it is there
    columns: tuple[Column, ...]
    curve: RecallCurve = field(default_factory=RecallCurve)
    default_effort: Effort | None = None

    def to_properties(self) -> dict[str, str]:
        tree = {
            "source": self.source,
            "type": self.index_type.name,
            "is_loaded": self.is_loaded,
            "columns": [[column.name, column.field, column.kind] for column in self.columns],
            "recall_curve": self.curve.to_list(),
            "default_effort": effort_to_tree(self.default_effort) if self.default_effort else None,
        }
        return {_PROPERTY: json.dumps(tree)}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], *, where: str) -> "GalleryProperties":
        """Raises ArtifactError where the collection is not one of ours."""
        if _PROPERTY not in properties:
            raise ArtifactError(
                f"{where} was not made by this program: it lacks the property {_PROPERTY}. Load a gallery into a "
                "collection of its own with `lookalike index load-milvus`."
            )
        tree = json.loads(properties[_PROPERTY])
        return cls(
            source=tree["source"],
            index_type=IndexType.parse(tree["type"]),
            is_loaded=tree["is_loaded"],
            columns=tuple(Column(*column) for column in tree["columns"]),
            curve=RecallCurve.from_list(tree["recall_curve"]),
            default_effort=Effort(**tree["default_effort"]) if tree["default_effort"] else None,
        )


def columns_of(schema: pa.Schema) -> tuple[Column, ...]:
    """Where each column of a metadata table goes.

    Raises:
        DataError: a column holds something else than text, numbers, truth values, dates or times.
    """
    names = [name for name in schema.names if _is_field_name(name)]
    columns = []
    for position, column in enumerate(schema):
        field_name = column.name
        if not _is_field_name(field_name):
            field_name = f"column_{position}"
            while field_name in names:
                field_name += "_"
            names.append(field_name)
        columns.append(Column(column.name, field_name, _kind_of(column)))
    return tuple(columns)


def new_rows(
    ids: Int64[ndarray, "n"],
    vectors: Float32[ndarray, "n dim"],
    metadata: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
) -> list[dict[str, Any]]:
    """Rows for `upsert`; cells that `metadata` lacks stay empty, except that the id is the key.

    Raises:
        ValueError: an unknown column, or a cell that is not of its column's kind, or beyond what Milvus stores.
    """
    known = {column.name for column in columns}
    rows = []
    for identifier, vector, cells in zip(ids.tolist(), vectors, metadata, strict=True):
        if unknown := set(cells) - known:
            raise ValueError(f"the metadata have no column {min(unknown)!r}; they have {', '.join(sorted(known))}.")
        row: dict[str, Any] = {ID_FIELD: identifier, VECTOR_FIELD: vector}
        for column in columns:
            value = cells.get(column.name, str(identifier) if column.name == KEY_COLUMN else None)
            try:
                row[column.field] = None if value is None else _stored(value, column.kind)
            except ValueError as error:
                raise ValueError(f"picture {identifier}, column {column.name}: {error}.") from error
        rows.append(row)
    return rows


def _stored(value: Any, kind: ColumnKind) -> Any:
    if kind == "text":
        text = str(value)  # dates and times, too
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise ValueError(f"a text of {len(text.encode()):,} bytes; Milvus stores up to {MAX_TEXT_BYTES:,}")
        return text
    if isinstance(value, bool) is not (kind == "truth") or not isinstance(value, int | float):
        raise ValueError(f"expected {IN_WORDS[kind]}, found {value!r}")
    if kind == "number":
        if not math.isfinite(value):
            raise ValueError(f"found {value}; Milvus stores finite numbers only")
        return float(value)
    if kind == "integer" and (not isinstance(value, int) or value not in INT64):
        raise ValueError(f"expected a whole number below 2^63, found {value!r}")
    return value


def _kind_of(column: pa.Field) -> ColumnKind:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_boolean(kind):
        return "truth"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "number"
    if (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_temporal(kind)
        or pa.types.is_null(kind)
    ):
        return "text"
    raise DataError(
        f"column {column.name} holds {column.type}; Milvus stores text, numbers, truth values, dates and times here. "
        "Leave the column out of the metadata."
    )


def _is_field_name(name: str) -> bool:
    return bool(_FIELD_NAME.fullmatch(name)) and name.lower() not in _RESERVED


@dataclass(frozen=True, slots=True)
class MilvusIndexType:
    """An index type in Milvus's words."""

    name: str
    build: dict[str, Any]

    @classmethod
    def of(cls, index_type: IndexType) -> "MilvusIndexType":
        """Raises SettingsError for a type that Milvus does not have."""
        name = _MILVUS_NAMES.get((index_type.family, index_type.codec))
        if name is None:
            raise SettingsError(
                f"type: Milvus has no {index_type.name}. Choose Flat, IVF<partitions>,<Flat|SQ8|RaBitQ>, or "
                "HNSW<links>[,SQ8]."
            )
        if index_type.family == "flat":
            return cls(name, {})
        if index_type.family == "ivf":
            return cls(name, {"nlist": index_type.num_partitions})
        build: dict[str, Any] = {"M": index_type.num_links, "efConstruction": _BREADTH_WHEN_BUILT}
        return cls(name, build | ({"sq_type": "SQ8"} if index_type.codec == "SQ8" else {}))


_BREADTH_WHEN_BUILT = 200
_MILVUS_NAMES = {
    ("flat", "Flat"): "FLAT",
    ("ivf", "Flat"): "IVF_FLAT",
    ("ivf", "SQ8"): "IVF_SQ8",
    ("ivf", "RaBitQ"): "IVF_RABITQ",
    ("hnsw", "Flat"): "HNSW",
    ("hnsw", "SQ8"): "HNSW_SQ",
}
