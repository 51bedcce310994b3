"""What a loss is to the training loop: called once a step, on the embeddings of all processes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LossShare:
    """One process's part of a step's loss. The parts of all processes add up to the loss of the batch."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "batch dim"]  # by every embedding of the batch
    # name -> (how many, of how many), of this process's queries: these add up, too.
    counts: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class BatchLoss(nn.Module):
    """A loss with whatever state it has: parameters of its own, a memory of earlier batches, numbers that change.

    A module, so that `parameters`, `to`, `state_dict` and `load_state_dict` mean what they always mean. All processes
    hold the same state.
    """

    # Times the learning rate of the backbone, for the loss's own parameters.
    lr_multiplier: float = 1.0

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        labels: Int64[Tensor, "batch"],
        *,
        share: tuple[int, int],
        step: int,
    ) -> LossShare:
        """One process's part; adds the part's gradient by the loss's own parameters to their `.grad`.

        Args:
            embeddings: Of all processes, at unit length.
            labels: Class of each, as the shard set counts them.
            share: (process, number of processes).
            step: Of the optimizer; together with the state it decides everything, chance included.
        """
        raise NotImplementedError

    def floor(self, labels: Int64[Tensor, "batch"], *, step: int) -> float | None:
        """The loss where every ranking is perfect; None where it is not known."""
        return None

    def numbers(self, *, step: int) -> dict[str, float]:
        """What `step` uses of that which changes while training, by name."""
        return {}

    def observe(self, shares: Mapping[str, float]) -> None:
        """Takes in the summed-up `counts` of a step, as shares between 0 and 1."""


def share_of_whole(
    loss_of_batch: Callable[[Tensor], Tensor], embeddings: Float[Tensor, "batch dim"], *, share: tuple[int, int]
) -> LossShare:
    """For a loss that cannot be split by queries: every process computes all of it and takes an equal part.

    Args:
        loss_of_batch: Embeddings -> loss, with a graph. Must give every process the same.
    """
    _, num_processes = share
    leaf = embeddings.detach().requires_grad_(True)
    with torch.enable_grad(), _deterministic(embeddings.device):
        part = loss_of_batch(leaf) / num_processes
        if part.requires_grad:
            part.backward()
    return LossShare(part.detach(), torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Sums in a fixed order on CPUs, where gradients of indexed entries otherwise depend on the threads' luck."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
