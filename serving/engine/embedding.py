"""Pictures -> vectors: decoded in a pool, embedded together."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float32, UInt8
from numpy import ndarray

from data_pipelines.decode import DecodeLimits
from data_pipelines.transforms import EvaluationTransform
from serving.engine.admission import Admission
from serving.engine.batching import Batcher
from serving.engine.embedder import Embedder
from serving.engine.queries import QueryPart
from serving.engine.settings import EngineSettings
from serving.engine.stages import Stages
from serving.engine.vectors_of_queries import decoded
from serving.observability.metrics import QueueState


@dataclass(frozen=True, slots=True, eq=False)
class _Pixels:
    encoder: Embedder
    pixels: UInt8[ndarray, "3 height width"]


class Embedding:
    """The way of pictures through decoding and the encoder; bounded."""

    def __init__(
        self,
        settings: EngineSettings,
        limits: DecodeLimits,
        workers: Executor,
        *,
        batch_size: int,
        on_batch: Callable[[int], None],
    ) -> None:
        """
        Args:
            batch_size: What suits the encoder; the settings may allow less.
            workers: Threads that decode.
            on_batch: Told the size of each batch that is embedded.
        """
        self._settings, self._limits, self._workers = settings, limits, workers
        self._admission = Admission(
            "pictures", most_inside=settings.max_waiting_pictures, most_seconds=settings.max_wait_seconds
        )
        self._batcher: Batcher[_Pixels, ndarray] = Batcher(
            _embed_together,
            name="encode",
            # A batch is one tensor of one encoder.
            key=lambda job: (id(job.encoder), job.pixels.shape),
            max_size=min(batch_size, settings.max_batch),
            max_wait_seconds=settings.max_batch_wait_ms / 1000,
            on_batch=on_batch,
        )

    @contextmanager
    def entering(self, count: int, *, deadline_seconds: float) -> Iterator[None]:
        """Around `embed`; raises OverloadedError where there is no room, or no time."""
        with self._admission.entering(count, deadline_seconds=deadline_seconds):
            yield

    async def embed(
        self, encoder: Embedder, parts: Sequence[QueryPart], stages: Stages, *, deadline_seconds: float
    ) -> list[Float32[ndarray, "dim"]]:
        """Raises DecodeError, UnsearchableRegionError, OverloadedError."""
        return list(await asyncio.gather(*[self._embed(encoder, part, stages, deadline_seconds) for part in parts]))

    def queue(self) -> QueueState:
        return QueueState(self._batcher.num_waiting, self._batcher.seconds_waited)

    def close(self) -> None:
        self._batcher.close()

    async def _embed(
        self, encoder: Embedder, part: QueryPart, stages: Stages, deadline_seconds: float
    ) -> Float32[ndarray, "dim"]:
        decode = stages.timed("decode", self._decode)
        pixels = await asyncio.get_running_loop().run_in_executor(self._workers, decode, encoder, part)
        done = await self._batcher.run(_Pixels(encoder, pixels), deadline_seconds=deadline_seconds)
        stages.count("encode", done.work_seconds)
        return done.result

    def _decode(self, encoder: Embedder, part: QueryPart) -> UInt8[ndarray, "3 height width"]:
        assert part.picture is not None
        scaled = self._settings.scaled_decode
        image = decoded(part.picture, part.roi, limits=self._limits, expected=encoder.input, is_scaled=scaled)
        return EvaluationTransform(encoder.input)(image)


def _embed_together(jobs: Sequence[_Pixels]) -> list[ndarray | Exception]:
    return list(jobs[0].encoder.embed([job.pixels for job in jobs]))
