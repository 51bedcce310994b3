"""A picture, an id or a vector -> hits. Knows no HTTP.

Every stage runs off the event loop: decoding, searching and reading in a pool, the encoder in one thread of its own,
which spreads its work over the cores by itself.
"""

import asyncio
import io
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image

from data_pipelines.decode import cropped, decode_image
from data_pipelines.shard_set import ShardSet
from data_pipelines.sources import pixel_box
from data_pipelines.transforms import EvaluationTransform
from indexing.published_index import PublishedIndex
from lookalike.artifacts import require_parent
from lookalike.encoder import Encoder, embed_pixels
from lookalike.errors import DataError, DecodeError, ResourceError
from lookalike.native_libraries import num_cores
from lookalike.records import SearchParameters

# Types that a browser never runs as documents; keyed by the extensions in the sample table.
_MEDIA_TYPES = {
    "bmp": "image/bmp",
    "gif": "image/gif",
    "jpg": "image/jpeg",
    "png": "image/png",
    "tif": "image/tiff",
    "webp": "image/webp",
}

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class UnknownItemError(DataError):
    """The index holds no picture with this id."""


class PicturesUnavailableError(ResourceError):
    """The server has no shards to read original pictures from."""


class UnsearchableVectorError(DataError):
    """A vector that no gallery vector can be compared with."""

    def __init__(self, reason: Literal["wrong_dim", "not_finite", "no_direction"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnsearchableRegionError(DataError):
    """A region that holds nothing of its picture."""

    def __init__(self, reason: Literal["empty", "outside"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of the gallery."""

    id: int
    key: str
    class_name: str | None
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Hit:
    item: Item
    score: float  # cosine similarity to the query


@dataclass(frozen=True, slots=True)
class Answer:
    """What one query found, best first, and how."""

    hits: list[Hit]
    index_version: str
    encoder_fingerprint: str
    timings_ms: dict[str, float]  # stage -> wall milliseconds of work; `queue` is the waiting, `total` is everything


@dataclass(frozen=True, slots=True)
class OriginalPicture:
    """A picture's bytes as they lie in the shards."""

    data: bytes
    media_type: str


class QueryEngine:
    """Answers queries over one published index; may be used by many tasks of one event loop at once."""

    def __init__(
        self, index: PublishedIndex, encoder: Encoder, shards: ShardSet | None, *, num_workers: int | None = None
    ) -> None:
        self.index = index
        self.shards = shards
        self.encoder_fingerprint = encoder.fingerprint
        self._encoder = encoder
        self._transform = EvaluationTransform(encoder.settings.input)
        self._workers = ThreadPoolExecutor(num_workers or num_cores(), thread_name_prefix="query")
        self._encoder_worker = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    @classmethod
    def open(
        cls, index_folder: Path, *, shards_folder: Path | None = None, num_workers: int | None = None
    ) -> "QueryEngine":
        """Opens the live version of an index, with its encoder and, where they can be found, its pictures.

        Raises:
            ArtifactError: index, encoder or shards are missing, damaged or were not made for each other.
        """
        index = PublishedIndex.open(index_folder)
        return cls(index, index.load_encoder(), _open_shards(index, shards_folder), num_workers=num_workers)

    async def warm_up(self) -> None:
        """Answers one query and sorts the ids, so that the first user does not wait for parts that are made late."""
        side = self._encoder.settings.input.size
        picture = io.BytesIO()
        Image.new("RGB", (side, side), "grey").save(picture, format="PNG")
        await self.search_by_picture(picture.getvalue(), SearchParameters())
        await self._run(self._workers, lambda: self.index.ids)

    async def search_by_picture(
        self, picture: bytes, parameters: SearchParameters, *, roi: Sequence[int | float] | None = None
    ) -> Answer:
        """Searches by a picture, or by the region `roi` of it alone, as if the shards held what the region shows.

        Args:
            roi: Left, top, right and bottom, finite, in pixels of the upright picture; rounded as `pixel_box` does, and
                cut at the picture's edges.

        Raises:
            DecodeError: the bytes are not a picture that can be decoded.
            UnsearchableRegionError: the region has no pixel, or none of the picture.
        """
        stages = _Stages()
        box = None if roi is None else _region_box(roi)
        pixels = await self._run(self._workers, stages.timed("decode", self._decode), picture, box)
        vector = await self._run(self._encoder_worker, stages.timed("encode", self._encode), pixels)
        return await self._search(vector, parameters, stages)

    async def search_by_vector(self, vector: Sequence[float], parameters: SearchParameters) -> Answer:
        """Scales `vector` to unit length first, so that scores are cosine similarities.

        Raises:
            UnsearchableVectorError: it has another length than the index's vectors, no direction, NaN or infinity.
        """
        return await self._search(_unit_vector(vector, dim=self.index.dim), parameters, _Stages())

    async def search_by_id(self, id: int, parameters: SearchParameters, *, includes_query: bool = False) -> Answer:
        """Searches by a gallery picture, which itself is left out of the hits unless `includes_query`.

        Raises:
            UnknownItemError: no picture has this id.
        """
        stages = _Stages()
        vector = await self._run(self._workers, stages.timed("lookup", self._vector_of), id)
        if includes_query:
            return await self._search(vector, parameters, stages)
        answer = await self._search(vector, replace(parameters, k=parameters.k + 1), stages)
        others = [hit for hit in answer.hits if hit.item.id != id]
        return replace(answer, hits=others[: parameters.k])

    async def item(self, id: int) -> Item:
        """Raises UnknownItemError where no picture has this id."""
        return await self._run(self._workers, self._item_of, id)

    async def random_items(self, count: int, *, seed: int) -> list[Item]:
        """Different items, in random order; all of them where the gallery holds fewer than `count`."""
        return await self._run(self._workers, self._random_items, count, seed)

    async def original_picture(self, id: int) -> OriginalPicture:
        """Raises UnknownItemError, or PicturesUnavailableError where the server has no shards."""
        return await self._run(self._workers, self._read_original, id)

    def close(self) -> None:
        """Waits for running work, then ends the threads and closes the shards."""
        self._workers.shutdown(cancel_futures=True)
        self._encoder_worker.shutdown(cancel_futures=True)
        if self.shards is not None:
            self.shards.close()

    async def _search(
        self, vector: Float32[ndarray, "1 dim"], parameters: SearchParameters, stages: "_Stages"
    ) -> Answer:
        found = await self._run(self._workers, stages.timed("search", self.index.search), vector, parameters)
        is_hit = found.ids[0] >= 0
        ids, scores = found.ids[0][is_hit].tolist(), found.scores[0][is_hit].tolist()
        items = await self._run(self._workers, stages.timed("metadata", self._items_of), ids)
        return Answer(
            hits=[Hit(item, score) for item, score in zip(items, scores, strict=True)],
            index_version=self.index.version,
            encoder_fingerprint=self.encoder_fingerprint,
            timings_ms=stages.timings_ms(),
        )

    def _decode(self, picture: bytes, box: tuple[int, int, int, int] | None) -> UInt8[ndarray, "3 height width"]:
        # Whole and at full size also for a small region: shards store regions so, and pixels must be theirs.
        image = decode_image(picture)
        return self._transform(image if box is None else _region(image, box))

    def _encode(self, pixels: UInt8[ndarray, "3 height width"]) -> Float32[ndarray, "1 dim"]:
        return embed_pixels(self._encoder, torch.from_numpy(pixels)[None]).numpy()

    def _vector_of(self, id: int) -> Float32[ndarray, "1 dim"]:
        self._require_indexed(id)
        return self.index.vectors_of(np.array([id], np.int64))

    def _item_of(self, id: int) -> Item:
        self._require_indexed(id)
        return self._items_of([id])[0]

    def _items_of(self, ids: list[int]) -> list[Item]:
        rows = self.index.metadata_of(np.array(ids, np.int64))
        return [
            Item(id, row["key"], row["class_name"], row["width"], row["height"])
            for id, row in zip(ids, rows, strict=True)
        ]

    def _random_items(self, count: int, seed: int) -> list[Item]:
        num_vectors = self.index.num_vectors
        positions = np.random.default_rng(seed).choice(num_vectors, size=min(count, num_vectors), replace=False)
        return self._items_of(self.index.ids[positions].tolist())

    def _require_indexed(self, id: int) -> None:
        # The metadata table also has rows of pictures without a vector: skipped ones and other splits.
        ids = self.index.ids
        position = int(np.searchsorted(ids, id))
        if position == len(ids) or ids[position] != id:
            raise UnknownItemError(f"index {self.index.version} holds no picture with id {id}")

    def _read_original(self, id: int) -> OriginalPicture:
        self._require_indexed(id)
        if self.shards is None:
            raise PicturesUnavailableError("this server has no shards to read pictures from")
        extension = self.shards.samples["extension"][id].as_py()
        return OriginalPicture(self.shards.read_bytes(id), _MEDIA_TYPES.get(extension, "application/octet-stream"))

    async def _run(self, pool: Executor, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


class _Stages:
    """Clock of one request: how long each stage worked."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._work_ms: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work`, whose time is counted as `stage` where it runs, without its wait for a thread."""

        def timed_work(*arguments: Any) -> Result:
            started = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self._work_ms[stage] = 1000 * (time.perf_counter() - started)

        return timed_work

    def timings_ms(self) -> dict[str, float]:
        total = 1000 * (time.perf_counter() - self._started)
        queue = max(0.0, total - sum(self._work_ms.values()))
        return {stage: round(ms, 3) for stage, ms in {**self._work_ms, "queue": queue, "total": total}.items()}


def _open_shards(index: PublishedIndex, folder: Path | None) -> ShardSet | None:
    """The shards that the index was made from: `folder`, which must fit, or the remembered place, if still there."""
    if folder is None and not index.shards_folder.is_dir():
        logger.warning("%s is gone: searching works, showing pictures does not. Give --shards.", index.shards_folder)
        return None
    folder = folder or index.shards_folder
    shards = ShardSet.open(folder)
    require_parent(index.folder, index.manifest, "shards", found=shards.fingerprint, parent=folder)
    return shards


def _region_box(roi: Sequence[int | float]) -> tuple[int, int, int, int]:
    try:
        return pixel_box(roi)
    except ValueError as error:
        found = ", ".join(f"{corner:g}" for corner in roi)
        raise UnsearchableRegionError("empty", f"the region {found} holds no pixel") from error


def _region(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    try:
        return cropped(image, box)
    except DecodeError as error:
        found = ", ".join(f"{corner:g}" for corner in box)
        detail = f"the region {found} is outside the upright picture, {image.width} x {image.height} pixels"
        raise UnsearchableRegionError("outside", detail) from error


def _unit_vector(values: Sequence[float], *, dim: int) -> Float32[ndarray, "1 dim"]:
    vector = np.asarray(values, np.float64)
    if len(vector) != dim:
        raise UnsearchableVectorError("wrong_dim", f"the vector has length {len(vector)}, this index holds {dim}")
    if not np.isfinite(vector).all():
        raise UnsearchableVectorError("not_finite", "the vector holds NaN or infinity")
    # Scaled first, because squares of very large or small values leave the range of floats.
    largest = np.abs(vector).max()
    if largest == 0:
        raise UnsearchableVectorError("no_direction", "the vector is all zeros")
    vector = vector / largest
    return (vector / np.linalg.norm(vector)).astype(np.float32)[None]
