"""Batches of pixels: class-balanced ones for training, every sample once for embedding."""

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.class_balanced_batches import rank_share
from data_pipelines.decode import CroppablePicture, DecodeLimits, decode_image
from data_pipelines.shard_reader import read_shard
from data_pipelines.shard_set import ShardSet
from lookalike.counter_random import counter_hash
from lookalike.errors import DataError, DecodeError, LookalikeError, ResourceError
from lookalike.worker_processes import prepare_lasting_worker
from lookalike.world import World

_STEPS_AHEAD_PER_WORKER = 2


@runtime_checkable
class BatchPlan(Protocol):
    def rows_of_step(self, step: int) -> Int64[ndarray, "batch"]:
        """The global batch of a step."""
        ...


@runtime_checkable
class SeededTransform(Protocol):
    def __call__(self, picture: CroppablePicture, *, seed: int) -> UInt8[ndarray, "3 size size"]: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a training step."""

    step: int
    rows: Int64[Tensor, "batch"]  # of the shard set
    pixels: UInt8[Tensor, "batch 3 size size"]
    labels: Int64[Tensor, "batch"]
    augmentation_seeds: Int64[Tensor, "batch"]  # what each picture's random choices came from


class SkippedSample(NamedTuple):
    row: int
    reason: str  # of the DecodeError


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Samples of a shard, of one shape; skipped ones have no pixels and shift nothing. All of them may be skipped."""

    rows: Int64[Tensor, "batch"]  # ascending
    pixels: UInt8[Tensor, "batch 3 height width"]
    skipped: tuple[SkippedSample, ...]


def training_batches(
    shard_set: ShardSet,
    plan: BatchPlan,
    transform: SeededTransform,
    *,
    world: World,
    seed: int,
    steps: range,
    num_workers: int,
) -> Iterator[Batch]:
    """Yields this rank's batch of each step, in order; the result depends on no other step and on no worker count.

    Each worker process makes whole steps, two ahead, so up to 2 * num_workers batches wait in shared memory. Without
    workers one thread works one step ahead. Close the iterator, or exhaust it, to end them.

    Raises:
        DataError: a picture cannot be decoded; the message names its key.
        ResourceError: a worker process was killed.
    """
    dataset = _TrainingSteps(shard_set, plan, transform, world, seed)
    made = _made_by_workers(dataset, steps, num_workers) if num_workers else _made_by_thread(dataset, steps)
    try:
        for batch in made:
            if isinstance(batch, _Failure):
                raise batch.kind(batch.message)
            yield batch
    finally:
        made.close()


def evaluation_batches(
    shard_set: ShardSet,
    shard_name: str,
    transform: Callable[[Image.Image], UInt8[ndarray, "3 height width"]],
    *,
    batch_size: int,
    num_threads: int = 1,
) -> Iterator[EvaluationBatch]:
    """Streams a shard, every sample once: with pixels, or named as skipped.

    Batches follow each other in row order. Where the transform keeps the shapes of pictures, `batch_size` consecutive
    samples become one batch per shape among them.

    The threads decode the next batch while the caller works on one.

    Raises:
        DataError: the shard is damaged.
    """
    if batch_size < 1 or num_threads < 1:
        raise ValueError(f"batch_size ({batch_size}) and num_threads ({num_threads}) must be at least 1")
    limits = shard_set.decode_limits
    samples = read_shard(shard_set, shard_name)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    ahead: list[tuple[int, Future[_Outcome]]] = []
    try:
        while True:
            chunk = list(islice(samples, batch_size))
            current, ahead = (
                ahead,
                [(row, pool.submit(_pixels_or_reason, data, transform, limits)) for row, data in chunk],
            )
            yield from _batches_by_shape((row, future.result()) for row, future in current)
            if not ahead:
                return
    finally:
        pool.shutdown(cancel_futures=True)
        samples.close()


_Outcome = UInt8[ndarray, "3 height width"] | str


def _pixels_or_reason(
    data: bytes, transform: Callable[[Image.Image], UInt8[ndarray, "3 height width"]], limits: DecodeLimits
) -> _Outcome:
    try:
        return transform(decode_image(data, limits=limits))
    except DecodeError as error:
        return error.reason


def _batches_by_shape(outcomes: Iterable[tuple[int, _Outcome]]) -> Iterator[EvaluationBatch]:
    """One batch per shape, in order of appearance; the first carries all that was skipped."""
    samples_of_shape: dict[tuple[int, ...], list[tuple[int, ndarray]]] = {}
    skipped: list[SkippedSample] = []
    for row, outcome in outcomes:
        if isinstance(outcome, str):
            skipped.append(SkippedSample(row, outcome))
        else:
            samples_of_shape.setdefault(outcome.shape, []).append((row, outcome))
    if skipped and not samples_of_shape:
        no_pixels = torch.empty((0, 3, 0, 0), dtype=torch.uint8)
        yield EvaluationBatch(torch.empty(0, dtype=torch.int64), no_pixels, tuple(skipped))
    for samples in samples_of_shape.values():
        rows, pixels = zip(*samples, strict=True)
        yield EvaluationBatch(torch.tensor(rows), torch.from_numpy(np.stack(pixels)), tuple(skipped))
        skipped = []


@dataclass(frozen=True, slots=True)
class _Failure:
    """A known error on its way out of a worker: torch would wrap it in the text of a traceback."""

    kind: type[LookalikeError]
    message: str


class _TrainingSteps(Dataset[Batch | _Failure]):
    """Step number -> this rank's batch. What a worker process receives."""

    def __init__(
        self, shard_set: ShardSet, plan: BatchPlan, transform: SeededTransform, world: World, seed: int
    ) -> None:
        self.shard_set = shard_set
        self.plan = plan
        self.transform = transform
        self.world = world
        self.seed = seed

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self._batch(step)
        except LookalikeError as error:
            return _Failure(type(error), str(error))

    def _batch(self, step: int) -> Batch:
        global_rows = self.plan.rows_of_step(step)
        rows = rank_share(global_rows, self.world)
        # Of the global batch, so a picture's augmentation does not depend on the world either.
        seeds = rank_share(augmentation_seeds(self.seed, step, global_rows), self.world)
        return Batch(
            step=step,
            rows=torch.from_numpy(rows.copy()),
            pixels=torch.from_numpy(self._pixels(rows, seeds)),
            labels=torch.from_numpy(self.shard_set.labels[rows]),
            augmentation_seeds=torch.from_numpy(seeds.copy()),
        )

    def _pixels(
        self, rows: Int64[ndarray, "batch"], seeds: Int64[ndarray, "batch"]
    ) -> UInt8[ndarray, "batch 3 size size"]:
        limits = self.shard_set.decode_limits
        pixels = np.empty((0, 3, 0, 0), dtype=np.uint8)
        for position, (row, seed) in enumerate(zip(rows.tolist(), seeds.tolist(), strict=True)):
            try:
                picture = self.transform(CroppablePicture(self.shard_set.read_bytes(row), limits=limits), seed=seed)
            except DecodeError as error:
                raise DataError(
                    f"sample {self.shard_set.key(row)!r} (row {row} of {self.shard_set.folder}) cannot be decoded: "
                    f"{error}. Check the shard set."
                ) from error
            if position == 0:
                # One buffer that is filled in place: a list of pictures to stack would double a large batch.
                pixels = np.empty((len(rows), *picture.shape), dtype=np.uint8)
            pixels[position] = picture
        return pixels


def augmentation_seeds(seed: int, step: int, rows: Int64[ndarray, "batch"]) -> Int64[ndarray, "batch"]:
    """A seed for each picture of a global batch, at least 0: a hash of seed, step, position and row."""
    return (counter_hash(seed, step, np.arange(len(rows)), rows) >> np.uint64(1)).astype(np.int64)


def _made_by_thread(dataset: _TrainingSteps, steps: Sequence[int]) -> Generator[Batch | _Failure, None, None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    ahead: Future[Batch | _Failure] | None = None
    try:
        for step in steps:
            current, ahead = ahead, pool.submit(dataset.__getitem__, step)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _made_by_workers(
    dataset: _TrainingSteps, steps: range, num_workers: int
) -> Generator[Batch | _Failure, None, None]:
    if not steps:
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=min(num_workers, len(steps)),
        prefetch_factor=_STEPS_AHEAD_PER_WORKER,
        multiprocessing_context=_worker_context(),
        worker_init_fn=_prepare_loader_worker,
        # Its own, or else starting workers would draw from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A dead worker shows as torch's RuntimeError that names its process, or as a broken pipe in the middle of a
        # batch. An error inside a living worker is not meant.
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise ResourceError(
            f"a worker process ended: {error}. Memory or shared memory (/dev/shm) may be full: use fewer workers or "
            "smaller batches."
        ) from error
    finally:
        # Dropping the iterator ends its workers.
        del batches


def _prepare_loader_worker(worker: int) -> None:
    # torch's own watchdog looks at the parent's process id, which is the fork server's.
    prepare_lasting_worker()


def _worker_context() -> BaseContext:
    """Forking a process that has run autograd can hang; a server that has only imported torch forks safely.

    The server and what it forks start with SIGTERM blocked, so that one for the whole process group leaves them to the
    step that it lets finish.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "data_pipelines.loader"])
    resource_tracker.ensure_running()  # the server starts it otherwise, and it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
