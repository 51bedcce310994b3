"""Do all processes together compute the gradient of one? A check for a user's own cluster, settings and encoder.

Sources of wrong answers that it finds: a library that averages where parts must be summed, or the other way round; a
back end that reduces too early; a loss whose parts do not add up; a network that corrupts messages.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from lookalike.collectives import all_gather_rows, broadcast_from_first
from lookalike.encoder import Encoder
from lookalike.world import World
from training.backend_settings import BackendSettings, DeepSpeedBackend, SingleBackend
from training.backends.protocol import MakeOptimizer, create_backend
from training.large_batch import ScoreEmbeddings, backward_large_batch, chunk_device

Precision = Literal["float32", "float64"]
# Largest relative difference of a parameter group's gradient that summation in another order explains.
BOUNDS: Mapping[Precision, float] = {"float32": 1e-5, "float64": 1e-10}
# (this process's labels, the world that shares the loss) -> what `backward_large_batch` calls.
MakeScore = Callable[[Tensor, World], ScoreEmbeddings]


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """One precision's result."""

    backend: str
    num_processes: int
    precision: Precision
    differences: dict[str, float]  # group -> |ours - one process's| / |one process's|

    @property
    def bound(self) -> float:
        return BOUNDS[self.precision]

    @property
    def worst(self) -> float:
        return max(self.differences.values())

    @property
    def has_passed(self) -> bool:
        return self.worst <= self.bound  # false for not-a-number

    def lines(self) -> list[str]:
        """For people: one line per group, and the verdict."""
        verdict = "passed" if self.has_passed else "FAILED"
        return [
            *(f"{difference:9.1e}  {group}" for group, difference in self.differences.items()),
            f"{verdict}: backend {self.backend} over {self.num_processes} processes in {self.precision}, "
            f"largest relative difference {self.worst:.1e}, bound {self.bound:.0e}",
        ]


def verify_gradients(
    encoder: Encoder,
    pixels: UInt8[Tensor, "batch 3 height width"],
    labels: Int64[Tensor, "batch"],
    make_score: MakeScore,
    make_optimizer: MakeOptimizer,
    *,
    backend: BackendSettings,
    chunk_size: int,
    num_kept_chunks: int = 0,
    precisions: Sequence[Precision] = ("float32", "float64"),
    world: World,
) -> list[GradientCheck]:
    """Compares a step's gradient by `backend` over all ranks with that by one process on the gathered batch.

    Dropout and stochastic depth are off and batch norms use stored statistics: they depend on who sees which picture.
    `encoder` stays as it is; a copy of it is trained. Rank 0
    computes alone while others wait for its verdict: keep the batch at a few chunks per process.

    Args:
        pixels: This process's; every process brings as many.
        labels: Of these pixels.
        make_score: Called once for all processes and once for one alone; must take embeddings in both precisions.
        chunk_size: Must divide the process's batch, so that one process sees the same chunks.
        precisions: Of weights and arithmetic. Float64 is left out where the back end does not have it.

    Returns:
        The same on every rank.

    Raises:
        ValueError: chunks would differ between the two computations.
        SettingsError, ResourceError: see `create_backend`.
    """
    if len(pixels) % chunk_size:
        raise ValueError(f"chunk_size {chunk_size} must divide the process's batch of {len(pixels)} pictures")
    device = chunk_device(encoder)
    everyones_pixels = all_gather_rows(pixels.to(device), world)
    everyones_labels = all_gather_rows(labels.to(device), world)
    own_labels = labels.to(device)

    def gradient(
        settings: BackendSettings, images: Tensor, classes: Tensor, precision: Precision, among: World
    ) -> dict[str, Tensor]:
        trained = copy.deepcopy(encoder).to(getattr(torch, precision)).eval()
        trainer = create_backend(settings, trained, make_optimizer, world=among)
        trainer.begin_step(num_chunks=len(images) // chunk_size, num_kept_chunks=num_kept_chunks)
        backward_large_batch(
            trainer.network,
            images,
            make_score(classes, among),
            chunk_size=chunk_size,
            num_kept_chunks=num_kept_chunks,
            seed=0,
            backward_chunk=trainer.backward_chunk,
        )
        return trainer.full_gradients()

    checks = []
    for precision in precisions:
        if precision == "float64" and isinstance(backend, DeepSpeedBackend):
            continue
        ours = gradient(backend, pixels, own_labels, precision, world)
        groups = sorted({group_of(name) for name in ours})
        differences = torch.zeros(len(groups), dtype=torch.float64, device=device)
        if world.is_first:
            alone = gradient(SingleBackend(), everyones_pixels, everyones_labels, precision, World())
            differences.copy_(torch.tensor([_difference(ours, alone, group) for group in groups]))
        broadcast_from_first(differences, world)
        found = dict(zip(groups, differences.tolist(), strict=True))
        checks.append(GradientCheck(backend.name, world.size, precision, found))
    return checks


def group_of(name: str) -> str:
    """A parameter's part of the encoder: `backbone.layer1`, `projection.1`, `pool.power`."""
    return ".".join(name.split(".")[:2])


def _difference(ours: dict[str, Tensor], alone: dict[str, Tensor], group: str) -> float:
    names = [name for name in alone if group_of(name) == group]
    wanted = torch.cat([alone[name].double().flatten() for name in names])
    found = torch.cat([ours[name].double().flatten() for name in names])
    scale = wanted.norm().item()
    difference = (found - wanted).norm().item()
    # A group without a gradient, such as the power of a pooling over a single position: it must have none here, too.
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
