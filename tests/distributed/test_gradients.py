"""W processes give the gradient of one: the seam on which multi-process training rests."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lookalike.collectives import all_gather_rows, any_rank, reduce_scatter_rows, sum_over_ranks
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training.distributed_loss import score_across_ranks
from training.large_batch import backward_large_batch
from training.losses import mixing_coefficients, recall_at_k_surrogate

# Classes of unequal size that straddle the ranks.
LABELS = np.repeat(np.arange(7), [1, 2, 3, 4, 5, 6, 3])
NUM_IMAGES = len(LABELS)


def parameter_gradients(world: World, dtype_name: str, mixes: bool) -> tuple[float, list[np.ndarray]]:
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.from_numpy(LABELS)
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 16)).to(dtype)

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = encoder

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.normalize(self.layers(images.to(dtype) / 255), dim=1)

    def share_of_loss(embeddings: Tensor, all_labels: Tensor, share: tuple[int, int]) -> Tensor:
        mixing = mixing_coefficients(all_labels, seed=0, step=3) if mixes else None
        return recall_at_k_surrogate(embeddings, all_labels, rank_temperature=0.1, mixing=mixing, query_share=share)

    per_rank = NUM_IMAGES // world.size
    own = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    loss, _ = backward_large_batch(
        Normalised(),
        pixels[own],
        lambda rows: score_across_ranks(rows, labels[own], share_of_loss, world=world),
        chunk_size=5,
        num_kept_chunks=0,
        seed=0,
    )
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    sum_over_ranks(gradients, world)
    return loss.item(), [gradient.numpy() for gradient in gradients]


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(("dtype_name", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parameter_gradients_equal_those_of_one_process(
    num_ranks: int, dtype_name: str, tolerance: float, mixes: bool
) -> None:
    expected_loss, expected = parameter_gradients(World(), dtype_name, mixes)
    for loss, gradients in run_on_ranks(parameter_gradients, num_ranks, dtype_name, mixes):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        for found, wanted in zip(gradients, expected, strict=True):
            assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


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
