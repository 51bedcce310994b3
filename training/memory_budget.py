"""How many pictures make a chunk, and how many chunks keep their graph: measured on the encoder, within a budget.

The chunk is the smallest whose speed is within 5% of the best of all sizes measured (2, 4, 8, ...): small chunks leave
more room, and how much is kept can be chosen more finely. What the budget leaves beside one chunk in flight is filled
with kept graphs. Times differ from run to run, so the plan is logged as the settings that pin it.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lookalike.collectives import all_gather_rows
from lookalike.errors import ResourceError
from lookalike.world import World
from training.large_batch import buffers_restored, chunk_device, embed_chunk, num_chunks

# The rest is for the loss, the loader and what allocators lose between blocks.
SHARE_OF_FREE_MEMORY = 0.7
_SMALLEST_GAIN = 0.05
# A size whose forward and backward pass would take longer is not tried.
_MAX_SECONDS_PER_CHUNK = 4.0
# Quick passes are repeated so long, slow ones once: the quickest counts.
_SECONDS_PER_TIMING = 1.0
_CGROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """What the forward and backward pass of one chunk take, beyond weights and their gradients."""

    graph_bytes: int  # from the end of the forward pass to the backward pass
    peak_bytes: int  # at the worst moment of both
    seconds: float  # of both


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How each process works through its part of a batch; the same on every rank."""

    chunk_size: int
    num_kept_chunks: int
    num_chunks: int
    bytes_per_picture: int  # of a kept graph
    bytes_in_flight: int  # of the one chunk at work, at its worst moment
    budget_bytes: int
    images_per_second: float  # one forward and one backward pass

    def __str__(self) -> str:
        return (
            f"batch.chunk_size={self.chunk_size} batch.num_kept_chunks={self.num_kept_chunks} (of {self.num_chunks}): "
            f"{self.bytes_per_picture / 1e6:.2f} MB per picture of a kept graph, {self.bytes_in_flight / 1e6:.0f} MB "
            f"in flight, budget {self.budget_bytes / 1e6:.0f} MB, {self.images_per_second:.0f} images/s per pass"
        )


def choose_chunks(
    encoder: nn.Module,
    picture_shape: tuple[int, int, int],
    batch_size: int,
    *,
    budget_bytes: int,
    chunk_size: int | None = None,
    autocast: torch.dtype | None = None,
    world: World = World(),
) -> ChunkPlan:
    """Measures the encoder on its device and plans for it; leaves weights, buffers, gradients and random state alone.

    All ranks call it at once and get one plan: rank 0 measures under the least budget of all ranks while the others
    wait for its answer. So the encoder's passes must not be collective themselves: measure it before a back end
    splits its weights or joins its batch norms across ranks, and before it is compiled.

    Args:
        encoder: In the mode it trains in.
        picture_shape: 3, height, width.
        batch_size: Pictures of one process.
        budget_bytes: For graphs and temporary values of the encoder; see `free_memory_budget`.
        chunk_size: Fixed instead of chosen. With batch norms that train it is part of the result, hence a setting.
        autocast: As in training.

    Raises:
        ResourceError: on every rank; the budget does not hold one chunk.
    """
    device = chunk_device(encoder)
    budgets = all_gather_rows(torch.tensor([budget_bytes], device=device), world)
    # float64 carries integers up to 2^53; a plan of zeros says that there is none.
    row, failure = torch.zeros(1, len(ChunkPlan.__dataclass_fields__), dtype=torch.float64, device=device), None
    if world.is_first:
        try:
            plan = plan_chunks(
                lambda size: measure_chunk(encoder, picture_shape, size, autocast=autocast),
                batch_size,
                budget_bytes=int(budgets.min()),
                chunk_size=chunk_size,
            )
            row = torch.tensor([astuple(plan)], dtype=torch.float64, device=device)
        except ResourceError as error:
            failure = error
    values = all_gather_rows(row, world)[0].tolist()
    if not any(values):
        raise failure or ResourceError("memory_budget does not hold one chunk: see the error of rank 0")
    plan = ChunkPlan(*(int(value) for value in values[:-1]), *values[-1:])
    if world.is_first:
        logger.info("chunks: %s", plan)
    return plan


def plan_chunks(
    measure: Callable[[int], ChunkCost], batch_size: int, *, budget_bytes: int, chunk_size: int | None = None
) -> ChunkPlan:
    """The plan for given costs by chunk size.

    Raises:
        ResourceError: the budget does not hold one chunk, of 2 pictures where the size is free.
    """
    if chunk_size is None:
        chunk_size = _smallest_fast_size(measure, batch_size, budget_bytes=budget_bytes)
        # As equal as possible: a small last chunk would waste a pass.
        chunk_size = num_chunks(batch_size, num_chunks(batch_size, chunk_size))
    cost, count = measure(chunk_size), num_chunks(batch_size, chunk_size)
    _require_room(cost, chunk_size, budget_bytes)
    return ChunkPlan(
        chunk_size=chunk_size,
        num_kept_chunks=num_kept_chunks(cost, count, budget_bytes=budget_bytes),
        num_chunks=count,
        bytes_per_picture=cost.graph_bytes // chunk_size,
        bytes_in_flight=cost.peak_bytes,
        budget_bytes=budget_bytes,
        images_per_second=chunk_size / cost.seconds,
    )


def num_kept_chunks(cost: ChunkCost, num_all_chunks: int, *, budget_bytes: int) -> int:
    """Graphs that fit beside one chunk in flight; none where not even that fits."""
    if cost.peak_bytes > budget_bytes:
        return 0
    kept = (budget_bytes - cost.peak_bytes) // max(1, cost.graph_bytes)
    # If all others are kept, the one in flight is the last one, and its graph is there anyway.
    return num_all_chunks if kept >= num_all_chunks - 1 else kept


def measure_chunk(
    encoder: nn.Module,
    picture_shape: tuple[int, int, int],
    chunk_size: int,
    *,
    autocast: torch.dtype | None = None,
) -> ChunkCost:
    """Runs a chunk of noise forward and backward, once for memory, then for time.

    On CUDA memory is what the caching allocator hands out. On a CPU the graph is the sum of distinct storages that
    autograd saves, and the peak is the growth of the process's resident size; where the system does not tell that, it
    is taken to be twice the graph.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (chunk_size, *picture_shape), dtype=torch.uint8, generator=generator)
    with _gradients_restored(encoder), buffers_restored(encoder):
        _seconds_of_pass(encoder, pixels[:2], autocast)  # allocates gradients, loads code
        graph_bytes, peak_bytes = _bytes_of_pass(encoder, pixels, autocast)
        seconds = [_seconds_of_pass(encoder, pixels, autocast)]
        while sum(seconds) < _SECONDS_PER_TIMING and len(seconds) < 20:
            seconds.append(_seconds_of_pass(encoder, pixels, autocast))
    return ChunkCost(graph_bytes, peak_bytes, min(seconds))


def free_memory_budget(
    encoder: nn.Module, *, share: float = SHARE_OF_FREE_MEMORY, num_processes_on_device: int = 1
) -> int:
    """A process's share of the memory that is free on the encoder's device, in bytes.

    Gradients and AdamW's two moments are taken off: they come with the first step.

    Raises:
        ResourceError: the encoder is on a CPU and the system does not say how much memory is available.
    """
    device = chunk_device(encoder)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = available_ram_bytes()
    to_come = 3 * sum(parameter.nbytes for parameter in encoder.parameters() if parameter.requires_grad)
    return int(share * free / num_processes_on_device) - to_come


def available_ram_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Memory that processes can still take: of the machine, or of the container where that is less."""
    try:
        available = _kibibytes(meminfo, "MemAvailable") * 1024
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"the available memory is not known on this system ({error}). Set batch.memory_budget, in bytes."
        ) from error
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="utf-8"))
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no container, or "max"
        return available
    return min(available, limit - used)


def _smallest_fast_size(measure: Callable[[int], ChunkCost], batch_size: int, *, budget_bytes: int) -> int:
    """Doubles the size while memory allows and one of the last two doublings brought speed."""
    rates: dict[int, float] = {}
    size = min(2, batch_size)
    while True:
        cost = measure(size)
        if not rates:
            _require_room(cost, size, budget_bytes)
        rates[size] = size / cost.seconds
        recent, before = list(rates.values())[-2:], list(rates.values())[:-2]
        has_levelled = bool(before) and max(recent) < (1 + _SMALLEST_GAIN) * max(before)
        growth = min(2 * size, batch_size) / size
        is_next_too_large = (
            cost.peak_bytes * growth > budget_bytes or cost.seconds * growth > _MAX_SECONDS_PER_CHUNK or growth == 1
        )
        if has_levelled or is_next_too_large:
            break
        size = min(2 * size, batch_size)
    return next(size for size, rate in rates.items() if rate >= (1 - _SMALLEST_GAIN) * max(rates.values()))


def _require_room(cost: ChunkCost, chunk_size: int, budget_bytes: int) -> None:
    if cost.peak_bytes > budget_bytes:
        raise ResourceError(
            f"forward and backward pass of {chunk_size} pictures take {cost.peak_bytes / 1e6:.1f} MB, the memory "
            f"budget is {budget_bytes / 1e6:.1f} MB. Raise batch.memory_budget, lower batch.chunk_size, or choose "
            "smaller pictures or a smaller backbone."
        )


def _bytes_of_pass(encoder: nn.Module, pixels: Tensor, autocast: torch.dtype | None) -> tuple[int, int]:
    device = chunk_device(encoder)
    saved = SavedBytes(encoder)
    meter = _CudaMeter(device) if device.type == "cuda" else _CpuMeter()
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        embeddings = embed_chunk(encoder, pixels, seed=0, index=0, autocast=autocast)
    graph_bytes = meter.held_bytes() or saved.num_bytes
    embeddings.backward(torch.ones_like(embeddings))
    return graph_bytes, max(graph_bytes, meter.peak_bytes() or 2 * graph_bytes)


def _seconds_of_pass(encoder: nn.Module, pixels: Tensor, autocast: torch.dtype | None) -> float:
    started = time.perf_counter()
    embeddings = embed_chunk(encoder, pixels, seed=0, index=0, autocast=autocast)
    embeddings.backward(torch.ones_like(embeddings))
    if embeddings.is_cuda:
        torch.cuda.synchronize(embeddings.device)
    return time.perf_counter() - started


class SavedBytes:
    """Counts the distinct storages that autograd saves for a backward pass, without the module's own tensors.

    `add` is the first of the two `saved_tensors_hooks`; storages are told apart by address, so the graph must live.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself might be the output of the node that keeps it

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())


class _CudaMeter:
    """Memory that PyTorch's allocator has handed out since the meter was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._start = torch.cuda.memory_allocated(device)

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._start

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._start


class _CpuMeter:
    """Growth of this process's resident size since the meter was made; 0 where the system does not tell."""

    def __init__(self) -> None:
        # glibc keeps what is freed; growth into such memory would not be seen.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from the present size
            self._start: int | None = _kibibytes(_PROCESS / "status", "VmRSS")
        except (OSError, ValueError):
            self._start = None

    def held_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        if self._start is None:
            return 0
        return 1024 * (_kibibytes(_PROCESS / "status", "VmHWM") - self._start)


def _kibibytes(file: Path, field: str) -> int:
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise ValueError(f"{file} has no {field}")


@contextmanager
def _gradients_restored(encoder: nn.Module) -> Iterator[None]:
    parameters = list(encoder.parameters())
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
