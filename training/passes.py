"""How a process goes through its part of each batch: chunks, kept graphs and arithmetic, chosen when a run begins."""

from dataclasses import dataclass

import torch

from lookalike.encoder import Encoder
from lookalike.world import World
from training.large_batch import chunk_device, freeze_batch_norm
from training.memory_budget import choose_chunks, free_memory_budget
from training.settings import BatchSettings, TrainSettings

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Passes:
    """What `backward_large_batch` is told of a run's two passes; the same on every rank."""

    chunk_size: int
    num_kept_chunks: int
    autocast: torch.dtype | None
    is_compiled: bool

    def resolve(self, batch: BatchSettings) -> BatchSettings:
        """The settings that pin these chunks."""
        if batch.num_kept_chunks != "auto":
            return batch
        chosen = {"chunk_size": self.chunk_size, "num_kept_chunks": self.num_kept_chunks, "memory_budget": "auto"}
        return batch.model_copy(update=chosen)


def plan_passes(settings: TrainSettings, encoder: Encoder, *, stored_chunk_size: int | None, world: World) -> Passes:
    """Takes the settings, and measures the encoder for what is `auto`; collective.

    Args:
        encoder: On its device, with frozen parameters marked, before it is compiled or spread.
        stored_chunk_size: That of a run that goes on. Chunks decide what dropout draws, so the size stays; how many
            are kept changes no result and is chosen for the memory of today.

    Raises:
        ResourceError: on every rank; the memory does not hold one chunk.
    """
    batch = settings.batch
    autocast, is_compiled = _AUTOCAST[settings.compute.precision], settings.compute.compiles_backbone
    chunk_size = stored_chunk_size if batch.chunk_size == "auto" else batch.chunk_size
    if batch.num_kept_chunks != "auto":
        assert chunk_size is not None  # the settings ensure it
        return Passes(chunk_size, batch.num_kept_chunks, autocast, is_compiled)
    encoder.train()
    if settings.batch_norm == "frozen":
        freeze_batch_norm(encoder)
    size = settings.encoder.input.size
    plan = choose_chunks(
        encoder,
        (3, size, size),
        batch.num_images // world.size,
        budget_bytes=_budget(batch, encoder, world),
        chunk_size=chunk_size,
        autocast=autocast,
        world=world,
    )
    return Passes(plan.chunk_size, plan.num_kept_chunks, autocast, is_compiled)


def _budget(batch: BatchSettings, encoder: Encoder, world: World) -> int:
    if batch.memory_budget != "auto":
        return batch.memory_budget
    shares_memory = chunk_device(encoder).type == "cpu"
    return free_memory_budget(encoder, num_processes_on_device=world.local_size if shares_memory else 1)
