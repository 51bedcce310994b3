"""W processes give the gradient of one: the seam on which multi-process training rests."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from lookalike.collectives import all_gather_rows, any_rank, reduce_scatter_rows, sum_over_ranks
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training.batch_norm import BatchNormStatistics
from training.distributed_loss import score_across_ranks
from training.large_batch import backward_large_batch
from training.loss_registry import create_loss
from training.loss_settings import LossSettings
from training.losses.batch_loss import BatchLoss

# Classes of unequal size that straddle the ranks, under the labels of a larger shard set.
LABELS = np.repeat(np.arange(7) * 10 + 3, [1, 2, 3, 4, 5, 6, 3])
CLASSES = torch.arange(0, 10) * 10 + 3
NUM_IMAGES = len(LABELS)
DIM = 16

LOSSES: dict[str, dict[str, Any]] = {
    "recall_at_k": {"rank_temperature": 0.1},
    "recall_at_k, mixed": {"rank_temperature": 0.1, "mixes_similarities": True},
    "smooth_ap": {"rank_temperature": 0.1},
    "smooth_ap, mixed": {"rank_temperature": 0.1, "mixes_similarities": True},
    "blackbox_ap": {},
    "contrastive": {},
    "contrastive, with memory": {"memory_size": 40},
    "triplet": {"triplets": "all"},
    "triplet, semihard": {},
    "margin": {"triplets": "all"},
    "margin, sampled, with a learned boundary": {"learns_boundary": True},
    "multi_similarity": {},
    "proxy_nca": {},
    "normalised_softmax": {},
    "fast_ap": {},
}


def loss_named(name: str) -> BatchLoss:
    tree = {"name": name.partition(",")[0], **LOSSES[name]}
    torch.manual_seed(7)
    return create_loss(TypeAdapter(LossSettings).validate_python(tree), dim=DIM, classes=CLASSES, seed=5)


class SmallEncoder(nn.Module):
    """A linear layer; a batch norm where asked for."""

    def __init__(self, dtype: torch.dtype, *, has_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        norm: nn.Module = nn.BatchNorm1d(48) if has_norm else nn.Identity()
        self.layers = nn.Sequential(nn.Flatten(), norm, nn.Linear(48, DIM)).to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(images.to(self.dtype) / 255), dim=1)


def share_of_batch(world: World) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a rank."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, 4, 4), dtype=torch.uint8, generator=generator)
    per_rank = NUM_IMAGES // world.size
    own = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    return pixels[own], torch.from_numpy(LABELS)[own]


def backward_step(encoder: nn.Module, loss: BatchLoss, world: World, *, step: int, chunk_size: int = 5) -> float:
    pixels, labels = share_of_batch(world)

    def score(rows: Tensor) -> tuple[Tensor, Tensor]:
        scored = score_across_ranks(rows, labels, loss, step=step, world=world)
        return scored.loss, scored.gradient

    for module in (encoder, loss):
        module.zero_grad(set_to_none=True)
    value, _ = backward_large_batch(encoder, pixels, score, chunk_size=chunk_size, num_kept_chunks=0, seed=0)
    parameters = [*encoder.parameters(), *loss.parameters()]
    sum_over_ranks([parameter.grad for parameter in parameters if parameter.grad is not None], world)
    return value.item()


def parameter_gradients(world: World, dtype_name: str, loss_name: str) -> tuple[list[float], list[np.ndarray]]:
    """Losses of two steps on moving weights, and the gradients of the second: a memory is then in use."""
    encoder = SmallEncoder(getattr(torch, dtype_name))
    loss = loss_named(loss_name)
    losses = []
    for step in (3, 4):
        losses.append(backward_step(encoder, loss, world, step=step))
        parameters = [*encoder.parameters(), *loss.parameters()]
        if step == 3:
            with torch.no_grad():
                for parameter in encoder.parameters():
                    parameter += 0.01 * torch.sin(torch.arange(parameter.numel()).view_as(parameter))
    return losses, [parameter.grad.numpy() for parameter in parameters if parameter.grad is not None]


def require_equal(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def gradients_of_losses(
    world: World, dtype_name: str, loss_names: list[str]
) -> dict[str, tuple[list[float], list[np.ndarray]]]:
    return {name: parameter_gradients(world, dtype_name, name) for name in loss_names}


# float32 and float64 differ in round-off only; a wrong factor or a lost part would be of order 1.
@pytest.mark.parametrize(("dtype_name", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize(
    ("num_ranks", "loss_names"), [(2, list(LOSSES)), (4, ["recall_at_k", "recall_at_k, mixed"])], ids=["2", "4"]
)
def test_parameter_gradients_equal_those_of_one_process(
    num_ranks: int, loss_names: list[str], dtype_name: str, tolerance: float
) -> None:
    expected = gradients_of_losses(World(), dtype_name, loss_names)
    for found in run_on_ranks(gradients_of_losses, num_ranks, dtype_name, loss_names):
        for name, (losses, gradients) in found.items():
            expected_losses, expected_gradients = expected[name]
            assert losses == pytest.approx(expected_losses, rel=tolerance), name
            assert all(np.linalg.norm(gradient) > 0 for gradient in expected_gradients), name
            require_equal(gradients, expected_gradients, tolerance)


def trained_statistics(world: World) -> tuple[list[np.ndarray], list[np.ndarray]]:
    encoder = SmallEncoder(torch.float64, has_norm=True).train()
    loss = loss_named("recall_at_k")
    for step in range(2):
        norms = BatchNormStatistics(encoder, are_trained=True)
        norms.begin_step()
        backward_step(encoder, loss, world, step=step, chunk_size=6)
        norms.end_step(world)
    gradients = [parameter.grad.numpy() for parameter in encoder.parameters() if parameter.grad is not None]
    return gradients, [buffer.numpy() for buffer in encoder.buffers()]


def test_trained_batch_norms_end_with_the_gradient_and_statistics_of_one_process() -> None:
    expected_gradients, expected_statistics = trained_statistics(World())
    for gradients, statistics in run_on_ranks(trained_statistics, 2):
        require_equal(gradients, expected_gradients, 1e-10)
        require_equal(statistics, expected_statistics, 1e-10)


def collective_results(world: World) -> dict[str, list[float]]:
    rows = torch.full((2, 1), float(world.rank))
    gathered = all_gather_rows(rows, world)
    scattered = reduce_scatter_rows(torch.arange(2.0 * world.size)[:, None], world)
    first, second = torch.ones(2), torch.full((1,), float(world.rank), dtype=torch.float64)
    sum_over_ranks([first, second], world)
    votes = [any_rank(world.rank == 1, world, device=torch.device("cpu")), any_rank(False, world, device=rows.device)]
    return {
        "gathered": gathered.flatten().tolist(),
        "scattered": scattered.flatten().tolist(),
        "summed": [*first.tolist(), *second.tolist()],
        "votes": [float(vote) for vote in votes],
    }


def test_collectives_mean_what_they_say() -> None:
    for rank, result in enumerate(run_on_ranks(collective_results, 2)):
        assert result["gathered"] == [0, 0, 1, 1]
        assert result["scattered"] == [4.0 * rank, 4.0 * rank + 2]
        assert result["summed"] == [2, 2, 1]
        assert result["votes"] == [1, 0]
