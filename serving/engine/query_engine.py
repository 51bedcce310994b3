"""Queries and changes -> answers: the public face of the engine.

Every stage runs off the event loop: decoding, re-ranking and reading in a pool; the encoder and the searches in threads
of their own, which work on what many requests ask at the same time together (`batching`). What waits is bounded
(`admission`): beyond, requests are refused at once, so that those let in are answered in time.
"""

import asyncio
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32
from numpy import ndarray
from PIL import Image

from data_pipelines.decode import DecodeLimits
from indexing.published_index import PublishedIndex
from indexing.reranking.registry import first_search, rerank
from indexing.reranking.settings import RerankSettings
from lookalike.errors import LookalikeError
from lookalike.filters import Filter
from lookalike.native_libraries import num_cores
from lookalike.records import SearchHits, SearchParameters
from serving.engine.admission import Admission
from serving.engine.changes import Changes
from serving.engine.compared_versions import ComparedVersions
from serving.engine.embedding import Embedding
from serving.engine.errors import (
    EncoderUnavailableError,
    UnknownItemError,
    UnsearchableFilterError,
    version_refusals,
)
from serving.engine.gallery import ids_after, item_of, random_ids
from serving.engine.pictures import Pictures
from serving.engine.queries import (
    Answer,
    Hit,
    IndexVersions,
    Item,
    PictureFile,
    QueryPart,
    Region,
    SearchQuery,
    Vector,
)
from serving.engine.searches import Searches
from serving.engine.searching import Found, SearchJob, among_others
from serving.engine.served_index import Served, ServedIndex
from serving.engine.settings import EngineSettings
from serving.engine.stages import Stages
from serving.engine.vectors_of_queries import unit_vector
from serving.observability.metrics import QueueState, ServingMetrics
from serving.observability.tracing import record_stages

Result = TypeVar("Result")


class QueryEngine:
    """Answers queries over one living index; may be used by many tasks at once, of several event loops."""

    def __init__(
        self,
        index: ServedIndex,
        *,
        settings: EngineSettings = EngineSettings(),
        picture_limits: DecodeLimits = DecodeLimits(),
        num_workers: int | None = None,
        metrics: ServingMetrics | None = None,
    ) -> None:
        """
        Args:
            num_workers: Threads that decode, re-rank and read, and threads that search approximately.
            metrics: Told batch sizes, stages and swaps.
        """
        threads = num_workers or num_cores()
        self._served_index, self._settings, self._limits, self._metrics = index, settings, picture_limits, metrics
        self._is_ready = False
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="query")
        # They come one after the other anyway, and while they wait for a lock, the others must not.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="changes")
        encoder = index.now().encoder
        self._embedding = Embedding(
            settings,
            picture_limits,
            self._workers,
            batch_size=settings.max_batch if encoder is None else encoder.batch_size,
            on_batch=lambda size: self._observe_batch("encode", size),
        )
        # By number alone: a list may take a hundred times what a thumbnail does, and no rate would tell of both.
        self._reads = Admission("lists and pictures", most_inside=settings.max_waiting_reads, most_seconds=math.inf)
        self._writes = Admission("changes", most_inside=settings.max_waiting_writes, most_seconds=math.inf)
        self._searches = Searches(
            settings, num_threads=threads, on_batch=lambda size: self._observe_batch("search", size)
        )
        self.pictures = Pictures(index.live.journal, cache_bytes=settings.thumbnail_cache_bytes)
        self._changes = Changes(index, metrics=metrics)
        self._compared = ComparedVersions(
            index, most_open=settings.max_compared_versions, most_waiting=settings.max_waiting_searches
        )

    @classmethod
    def open(
        cls,
        index_folder: Path,
        *,
        shards_folder: Path | None = None,
        num_workers: int | None = None,
        settings: EngineSettings = EngineSettings(),
        picture_limits: DecodeLimits = DecodeLimits(),
        metrics: ServingMetrics | None = None,
    ) -> "QueryEngine":
        """Opens an index, with its encoder and its pictures where it has some, and embeds its canaries.

        Raises:
            ArtifactError: index, encoder or shards are missing, damaged or were not made for each other.
        """
        index = ServedIndex(index_folder, shards_folder=shards_folder, vectors_only=settings.vectors_only)
        return cls(index, settings=settings, picture_limits=picture_limits, num_workers=num_workers, metrics=metrics)

    # What is served

    def served(self) -> Served:
        """What answers at this moment; it stays as it is."""
        served = self._served_index.now()
        self._compared.forget_gone(served)
        return served

    @property
    def index(self) -> PublishedIndex:
        """The version that serves, without the changes since."""
        return self.served().view.base

    @property
    def num_changes(self) -> int:
        """In the journal, not yet compacted."""
        return self._served_index.live.num_changes

    @property
    def settings(self) -> EngineSettings:
        """What bounds batches and queues."""
        return self._settings

    @property
    def is_ready(self) -> bool:
        """Whether it has been warmed up and not been closed."""
        return self._is_ready

    def queues(self) -> dict[str, QueueState]:
        """What waits for the encoder and for searches at this moment."""
        return {"encode": self._embedding.queue(), "search": self._searches.queue()}

    async def warm_up(self) -> None:
        """Answers one query and lists the ids, so that the first user does not wait for parts that are made late."""
        served = self.served()
        if served.encoder is None:
            part = QueryPart(vector=np.ones(served.view.dim))
        else:
            side = served.encoder.input.size
            picture = io.BytesIO()
            Image.new("RGB", (side, side), "grey").save(picture, format="PNG")
            part = QueryPart(picture=picture.getvalue())
        await self.search(SearchQuery((part,)))
        await self._run(served.view.base.ids)
        self._is_ready = True

    def close(self) -> None:
        """Finishes running work, then ends the threads and closes the index; doing it again does nothing."""
        self._is_ready = False
        self._changes.close()
        self._compared.close()
        self._writer.shutdown(cancel_futures=True)
        self._embedding.close()
        self._searches.close()
        self._workers.shutdown(cancel_futures=True)
        self._served_index.close()

    # Searching

    async def search(self, query: SearchQuery) -> Answer:
        """Every part of an answer is of one moment of the index.

        Raises:
            OverloadedError: there is no room, or no time.
            EncoderUnavailableError: a part is a picture, and there is no encoder.
            DecodeError: a picture cannot be decoded.
            UnsearchableRegionError: a region has no pixel, or none of its picture.
            UnknownItemError: no picture has the id of a part.
            UnsearchableVectorError: a vector has another length than the index's, no direction, NaN or infinity; or
                the parts cancel each other out.
            UnsearchableFilterError: the filter does not fit the metadata.
            UnknownVersionError: there is no version of this name.
            VersionRefusedError: it could not be swapped to, for what it is.
            VersionUnavailableError: it cannot be opened at this moment.
            ComparisonOffError: it does not serve, and this server searches no other.
        """
        stages, served = Stages(), self.served()
        if query.version is not None:
            deadline = self._deadline(query.deadline_seconds)
            served = await self._compared.named(query.version, served, stages, deadline_seconds=deadline)
        pictures = [part for part in query.parts if part.picture is not None]
        if not pictures:
            return await self._search(query, served, [None] * len(query.parts), stages)
        embedded = iter(await self._embed(served, pictures, stages, query.deadline_seconds))
        vectors = [None if part.picture is None else next(embedded) for part in query.parts]
        now = served if query.version is not None else self.served()
        # Vectors of another encoder cannot be compared; what served when the request came can still be searched.
        return await self._search(query, now if now.encoder is served.encoder else served, vectors, stages)

    async def greatest_dim(self) -> int:
        """Length of the longest vectors that a search may be by, of those of all versions."""
        if not self._settings.max_compared_versions:
            return self.index.dim
        return await self._run(self._served_index.greatest_dim)

    async def search_all(self, queries: Sequence[SearchQuery]) -> list[Answer | LookalikeError]:
        """Each query's answer, or why there is none."""
        outcomes = await asyncio.gather(*[self.search(query) for query in queries], return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, LookalikeError):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Answer | LookalikeError)]

    async def search_by_picture(
        self,
        picture: bytes,
        parameters: SearchParameters,
        *,
        roi: Region | None = None,
        rerank_by: RerankSettings | None = None,
    ) -> Answer:
        """Searches by a picture, or by the region `roi` of it alone, as if the shards held what the region shows."""
        return await self.search(SearchQuery((QueryPart(picture=picture, roi=roi),), parameters, rerank_by))

    async def search_by_vector(
        self, vector: Vector, parameters: SearchParameters, *, rerank_by: RerankSettings | None = None
    ) -> Answer:
        """Scales `vector` to unit length first, so that scores are cosine similarities."""
        return await self.search(SearchQuery((QueryPart(vector=vector),), parameters, rerank_by))

    async def search_by_id(
        self,
        id: int,
        parameters: SearchParameters,
        *,
        includes_query: bool = False,
        rerank_by: RerankSettings | None = None,
    ) -> Answer:
        """Searches by a gallery picture, which itself is left out of the hits unless `includes_query`."""
        return await self.search(SearchQuery((QueryPart(id=id),), parameters, rerank_by, includes_query))

    async def _search(
        self,
        query: SearchQuery,
        served: Served,
        of_pictures: Sequence[Float32[ndarray, "dim"] | None],
        stages: Stages,
    ) -> Answer:
        parameters, deadline = query.parameters, self._deadline(query.deadline_seconds)
        left_out = [] if query.includes_query else [part.id for part in query.parts if part.id is not None]
        if query.rerank and left_out:
            # What must not be found must have no say in the order of the others either.
            parameters, left_out = replace(parameters, among=among_others(parameters.among, left_out)), []
        first = first_search(query.rerank, parameters) if query.rerank else parameters
        # Handing the metadata to another thread would cost as much as they do; a second look takes longer.
        describe = None if query.rerank else partial(self._described, served, includes_vectors=query.includes_vectors)
        job = SearchJob.of(served, query.parts, of_pictures, first, left_out=left_out, describe=describe)
        # Pictures were let in already, and must not be turned away after they were embedded.
        has_pictures = any(vector is not None for vector in of_pictures)
        with self._searches.entering(deadline_seconds=deadline, may_be_refused=not has_pictures):
            found = (await self._searches.find(job, deadline_seconds=deadline)).result
            stages.count("search", found.search_seconds)
            if query.rerank:
                hits = await self._run(self._looked_at_again, query, served, found, parameters, stages)
            else:
                stages.count("metadata", found.describe_seconds)
                hits = found.described
        timings = stages.timings_ms()
        if self._metrics is not None:
            self._metrics.observe_stages(timings)
        record_stages(stages.spans_ns)
        return Answer(hits, served.index_version, served.encoder_fingerprint, timings)

    def _looked_at_again(
        self, query: SearchQuery, served: Served, found: Found, parameters: SearchParameters, stages: Stages
    ) -> list[Hit]:
        again = stages.timed("rerank", rerank)
        hits = again(query.rerank, served.view, found.vector, found.hits, parameters)
        describe = partial(self._described, includes_vectors=query.includes_vectors)
        return stages.timed("metadata", describe)(served, hits)

    def _described(self, served: Served, hits: SearchHits, *, includes_vectors: bool) -> list[Hit]:
        is_hit = hits.ids[0] >= 0
        ids, scores = hits.ids[0][is_hit], hits.scores[0][is_hit].tolist()
        vectors: list[Any] = list(served.view.vectors_of(ids)) if includes_vectors else [None] * len(ids)
        items = self._items_of(served, ids)
        return [Hit(item, score, vector) for item, score, vector in zip(items, scores, vectors, strict=True)]

    async def _embed(
        self, served: Served, parts: Sequence[QueryPart], stages: Stages, deadline_seconds: float | None = None
    ) -> list[Float32[ndarray, "dim"]]:
        if served.encoder is None:
            raise EncoderUnavailableError(
                f"this server serves index {served.index_version} without an encoder that pictures could go through"
            )
        deadline = self._deadline(deadline_seconds)
        with self._embedding.entering(len(parts), deadline_seconds=deadline):
            return await self._embedding.embed(served.encoder, parts, stages, deadline_seconds=deadline)

    # Items

    async def item(self, id: int) -> Item:
        """Raises UnknownItemError where no picture has this id, and OverloadedError as all that reads."""
        return await self._read(self._item_of, self.served(), id)

    async def items(self, *, after_id: int = -1, limit: int, filter: Filter | None = None) -> list[Item]:
        """In ascending order of ids, from the first above `after_id`; fewer than `limit` only at the end.

        Raises:
            UnsearchableFilterError: the filter does not fit the metadata.
        """

        def listed(served: Served) -> list[Item]:
            try:
                ids = ids_after(served.view, after_id, limit, filter)
            except ValueError as error:
                raise UnsearchableFilterError(str(error)) from error
            return self._items_of(served, ids)

        return await self._read(listed, self.served())

    async def random_items(self, count: int, *, seed: int) -> list[Item]:
        """Different items, in random order; all of them where the gallery holds fewer than `count`."""

        def picked(served: Served) -> list[Item]:
            return self._items_of(served, random_ids(served.view, count, seed))

        return await self._read(picked, self.served())

    async def original(self, id: int) -> PictureFile:
        """Raises UnknownItemError, or PicturesUnavailableError where no picture is at hand."""

        def read(served: Served) -> PictureFile:
            return self.pictures.original(served, id, self._row_of(served, id))

        return await self._read(read, self.served())

    async def thumbnail(self, id: int, *, side: int) -> PictureFile:
        """A JPEG within a square of `side` pixels; raises as `original` does, and DecodeError."""

        def made(served: Served) -> PictureFile:
            return self.pictures.thumbnail(served, id, self._row_of(served, id), side=side)

        return await self._read(made, self.served())

    # Changes

    async def add(
        self,
        *,
        picture: bytes | None = None,
        vector: Vector | None = None,
        metadata: Mapping[str, Any] | None = None,
        id: int | None = None,
    ) -> Item:
        """Adds a picture, or a vector alone; it is durable before this returns, and the next search finds it.

        Raises:
            ValueError: not exactly one of picture and vector is given.
            IdTakenError: the id is in use.
            UnfitItemError: id or metadata do not fit the index.
            OverloadedError: too many changes wait already, or pictures.
            ResourceError: the journal cannot be written.
            Exception: whatever `search` raises for such a picture or vector.
        """
        with self._writes.entering():
            served, unit = await self._vector_to_store(picture, vector)
            written, chosen = await self._write(self._changes.add, served, unit, picture, metadata or {}, id)
            return await self._run(self._item_of, written, chosen)

    async def replace(
        self,
        id: int,
        *,
        picture: bytes | None = None,
        vector: Vector | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Item:
        """Gives an id another picture or vector; `metadata` that are None stay as they are. As durable as `add`.

        Raises:
            UnknownItemError: no picture has this id.
            Exception: whatever `add` raises.
        """
        with self._writes.entering():
            await self._run(self._row_of, self.served(), id)
            served, unit = await self._vector_to_store(picture, vector)
            written = await self._write(self._changes.replace, served, id, unit, picture, metadata)
            return await self._run(self._item_of, written, id)

    async def delete(self, id: int) -> None:
        """As durable as `add`. Raises UnknownItemError where no picture has this id, and OverloadedError."""
        with self._writes.entering():
            await self._write(self._changes.delete, id)

    async def _vector_to_store(
        self, picture: bytes | None, vector: Vector | None
    ) -> tuple[Served, Float32[ndarray, "dim"]]:
        part = QueryPart(picture=picture, vector=vector)
        served = self.served()
        if part.picture is None:
            assert part.vector is not None
            return served, unit_vector(part.vector, dim=served.view.dim).astype(np.float32)
        [embedded] = await self._embed(served, [part], Stages())
        return served, embedded

    # Versions

    async def versions(self) -> IndexVersions:
        """Raises VersionUnavailableError where the folder does not tell which is current, and OverloadedError."""
        return await self._read(self._changes.versions)

    async def swap(self, version: str) -> str:
        """Opens and checks a version, then makes it current and serves it; returns its name.

        Raises:
            UnknownVersionError: there is no such version.
            VersionRefusedError: it cannot be served: nothing has changed.
            VersionUnavailableError: a compaction is under way.
        """
        return await self._changed_over(lambda: self._changes.swap(version))

    async def rollback(self) -> str:
        """Swaps to the version before the current one; raises as `swap`."""
        return await self._changed_over(self._changes.rollback)

    async def compact(self) -> str:
        """Builds a version with all changes in another process, and serves it; returns its name.

        Raises:
            CompactionFailedError: it was begun, and failed.
            VersionUnavailableError: another compaction is under way.
            VersionRefusedError: the new version failed its check: the old one goes on serving.
        """
        return await self._changed_over(self._changes.compact)

    async def _changed_over(self, begin: Callable[[], "Future[str]"]) -> str:
        with version_refusals(self._served_index.folder):
            return await asyncio.wrap_future(begin())

    # Parts of the above that run in the pool

    def _row_of(self, served: Served, id: int) -> dict[str, Any]:
        with _unknown_items_named(served, id):
            return served.view.metadata_of(np.array([id], np.int64))[0]

    def _item_of(self, served: Served, id: int) -> Item:
        with _unknown_items_named(served, id):
            return self._items_of(served, np.array([id], np.int64))[0]

    def _items_of(self, served: Served, ids: ndarray) -> list[Item]:
        rows = served.view.metadata_of(ids)
        numbers = ids.tolist()
        tags = self.pictures.tags(served, numbers, rows)
        return [item_of(number, row, tag) for number, row, tag in zip(numbers, rows, tags, strict=True)]

    def _deadline(self, seconds: float | None) -> float:
        longest = self._settings.max_wait_seconds
        return longest if seconds is None else min(seconds, longest)

    def _observe_batch(self, kind: str, size: int) -> None:
        if self._metrics is not None:
            self._metrics.observe_batch(kind, size)

    async def _write(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *arguments)

    async def _read(self, work: Callable[..., Result], *arguments: Any) -> Result:
        with self._reads.entering():
            return await self._run(work, *arguments)

    async def _run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)


@contextmanager
def _unknown_items_named(served: Served, id: int) -> Iterator[None]:
    try:
        yield
    except KeyError:
        raise UnknownItemError(f"index {served.index_version} holds no picture with id {id}") from None
