"""A Milvus collection as this program uses it: the client's calls, and its errors in our words."""

import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float32
from numpy import ndarray

from indexing.index_types import IndexType
from indexing.searching.milvus_expressions import EVERYTHING, ID_FIELD
from indexing.searching.milvus_layout import MAX_TEXT_BYTES, VECTOR_FIELD, GalleryProperties, MilvusIndexType
from lookalike.errors import ArtifactError, ResourceError, SettingsError
from lookalike.native_libraries import load_faiss

LOCAL_SUFFIX = ".db"
TIMEOUT_SECONDS = 60.0
MOST_HITS = 16_384  # Milvus returns no more per query
_REQUEST_BYTES = 16 << 20  # of rows in one upsert; servers take up to 64 MiB
_COLLECTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


class MilvusCollection:
    """One collection at one address; every failure of the server is a ResourceError that names both."""

    def __init__(self, uri: str, name: str) -> None:
        """Connects; `uri` is `http://host:19530`, `https://user:password@host`, or a local file `folder/name.db`.

        Raises:
            SettingsError: `uri` or `name` is not valid.
            ResourceError: pymilvus is not installed, or nothing answers at `uri`.
        """
        if not _COLLECTION_NAME.fullmatch(name):
            raise SettingsError(f"collection: {name!r} must be of letters, digits and _, not begin with a digit.")
        self.uri, self.name = uri, name
        with self._reporting():
            self._client = _connect(uri)

    def __str__(self) -> str:
        return f"collection {self.name} at {_without_password(self.uri)}"

    def exists(self) -> bool:
        return bool(self._ask("has_collection"))

    def create(self, dim: int, properties: GalleryProperties) -> None:
        """An empty collection; `Strong` lets every search see all writes that were acknowledged before it."""
        from pymilvus import DataType, MilvusClient

        kinds = {"integer": DataType.INT64, "number": DataType.DOUBLE, "truth": DataType.BOOL}
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(ID_FIELD, DataType.INT64, is_primary=True)
        schema.add_field(VECTOR_FIELD, DataType.FLOAT_VECTOR, dim=dim)
        for column in properties.columns:
            if column.kind == "text":
                schema.add_field(column.field, DataType.VARCHAR, max_length=MAX_TEXT_BYTES, nullable=True)
            else:
                schema.add_field(column.field, kinds[column.kind], nullable=True)
        self._ask("create_collection", schema=schema, consistency_level="Strong", properties=properties.to_properties())

    def ensure_index(self, index_type: IndexType) -> None:
        """Makes the index of vectors where there is none."""
        from pymilvus import MilvusClient

        if self._ask("list_indexes", field_name=VECTOR_FIELD):
            return
        milvus_type = MilvusIndexType.of(index_type)
        parameters = MilvusClient.prepare_index_params()
        # Twice `params`: the client unpacks the outer one, and milvus-lite reads nothing but the inner one.
        build = {"params": milvus_type.build}
        parameters.add_index(VECTOR_FIELD, milvus_type.name, index_name=VECTOR_FIELD, metric_type="IP", params=build)
        self._ask("create_index", index_params=parameters)

    def properties(self) -> GalleryProperties:
        """Raises ArtifactError where there is no such collection, or it is not one of ours."""
        return GalleryProperties.from_properties(self._about()["properties"], where=str(self))

    def describe(self) -> "CollectionFacts":
        """Raises ArtifactError where there is no such collection, it is not one of ours, or has another index."""
        about = self._about()
        properties = GalleryProperties.from_properties(about["properties"], where=str(self))
        index = self._ask("describe_index", index_name=VECTOR_FIELD) if self._ask("list_indexes") else {}
        expected = MilvusIndexType.of(properties.index_type)
        found = {**index, **index.get("params", {})}
        if found.get("index_type") != expected.name or any(
            str(found.get(k)) != str(v) for k, v in expected.build.items()
        ):
            raise ArtifactError(
                f"{self} has another index ({found}) than it was loaded with ({properties.index_type.name}): what is "
                "known of its recall is not true. Load the gallery again, into another collection."
            )
        [dim] = [int(entry["params"]["dim"]) for entry in about["fields"] if entry["name"] == VECTOR_FIELD]
        return CollectionFacts(dim, int(index["pending_index_rows"]), properties)

    def write_properties(self, properties: GalleryProperties) -> None:
        self._ask("alter_collection_properties", properties=properties.to_properties())

    def load(self) -> None:
        """Has the server hold it in memory; searches fail before."""
        self._ask("load_collection")

    def flush(self) -> None:
        """Seals what was written, so that it gets an index."""
        self._ask("flush")

    def drop(self) -> None:
        self._ask("drop_collection")

    def count(self, expression: str = "") -> int:
        """Rows for which it holds; all where it is empty."""
        answer = self._ask("query", filter=expression, output_fields=["count(*)"], consistency_level="Strong")
        return int(answer[0]["count(*)"])

    def upsert(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows in requests that the server accepts; one whose id is there already takes its place."""
        request: list[dict[str, Any]] = []
        request_bytes = 0
        for row in rows:
            text_bytes = sum(4 * len(value) for value in row.values() if isinstance(value, str))
            row_bytes = row[VECTOR_FIELD].nbytes + 16 * len(row) + text_bytes
            if request and request_bytes + row_bytes > _REQUEST_BYTES:
                self._ask("upsert", data=request)
                request, request_bytes = [], 0
            request.append(row)
            request_bytes += row_bytes
        if request:
            self._ask("upsert", data=request)

    def delete(self, ids: list[int]) -> None:
        self._ask("delete", ids=ids)

    def rows_of(self, ids: list[int], fields: list[str]) -> dict[int, Mapping[str, Any]]:
        """Those of `ids` that are there."""
        rows = self._ask("query", ids=ids, output_fields=[ID_FIELD, *fields], consistency_level="Strong")
        return {int(row[ID_FIELD]): row for row in rows}

    def all_ids(self) -> Iterator[list[int]]:
        with self._reporting():
            batches = self._client.query_iterator(
                self.name,
                batch_size=MOST_HITS,
                filter=EVERYTHING,
                output_fields=[ID_FIELD],
                consistency_level="Strong",
                timeout=TIMEOUT_SECONDS,
            )
            try:
                while batch := batches.next():
                    yield [int(row[ID_FIELD]) for row in batch]
            finally:
                batches.close()

    def search(
        self, queries: Float32[ndarray, "queries dim"], limit: int, expression: str, effort: Mapping[str, int]
    ) -> Any:
        """Per query, hits with `id`, `distance` (the inner product) and the stored vector."""
        return self._ask(
            "search",
            data=list(queries),
            anns_field=VECTOR_FIELD,
            filter=expression,
            limit=limit,
            output_fields=[VECTOR_FIELD],
            search_params={"metric_type": "IP", "params": dict(effort)},
            consistency_level="Strong",
        )

    def close(self) -> None:
        """Disconnects; of a local file, also ends the engine, for all in this process that use that file."""
        self._client.close()
        if self.uri.endswith(LOCAL_SUFFIX):
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)

    def _about(self) -> dict[str, Any]:
        if not self.exists():
            raise ArtifactError(f"there is no {self}. Make it with `lookalike index load-milvus`.")
        about: dict[str, Any] = self._ask("describe_collection")
        return about

    def _ask(self, method: str, **arguments: Any) -> Any:
        with self._reporting():
            return getattr(self._client, method)(self.name, timeout=TIMEOUT_SECONDS, **arguments)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns the client's errors into one that names the address."""
        load_pymilvus()
        import grpc
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            reason = getattr(error, "message", None) or str(error)
            raise ResourceError(
                f"Milvus failed for {self}: {reason}. Check that a server runs at this address, and that it is healthy."
            ) from error


@dataclass(frozen=True, slots=True)
class CollectionFacts:
    """What a collection is."""

    dim: int
    num_pending: int  # sealed rows that the server has yet to put into the index
    properties: GalleryProperties


def load_pymilvus() -> None:
    """Raises ResourceError where pymilvus is not installed."""
    if importlib.util.find_spec("pymilvus") is None:
        raise ResourceError("pymilvus is not installed. Install lookalike with the extra [milvus].")
    # It logs every refused call with a traceback, beside the exception that it raises.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


def _connect(uri: str) -> Any:
    from pymilvus import MilvusClient
    from pymilvus.exceptions import ConnectionConfigException

    if uri.endswith(LOCAL_SUFFIX):
        if importlib.util.find_spec("milvus_lite") is None:
            raise ResourceError(f"{uri}: local files need milvus-lite. Install it, or give the address of a server.")
        if not Path(uri).parent.is_dir():
            raise SettingsError(f"{uri}: there is no folder {Path(uri).parent}.")
        load_faiss()  # milvus-lite imports faiss: after torch, as everywhere
        # milvus-lite 3.2 has no AllocTimestamp; the client does without, but the server logs a traceback.
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
    try:
        return MilvusClient(uri, timeout=TIMEOUT_SECONDS)
    except ConnectionConfigException as error:
        if uri.endswith(LOCAL_SUFFIX):
            raise ResourceError(f"{uri} cannot be opened: it is damaged, or another process has it open.") from error
        raise SettingsError(f"{_without_password(uri)} is not an address of Milvus: {error.message}.") from error


def _without_password(uri: str) -> str:
    return re.sub(r"(?<=//)[^/@]*@", "", uri)
