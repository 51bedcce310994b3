import pytest
import torch
from torch import Tensor, nn

from lookalike.world import World
from training.batch_norm import BatchNormStatistics
from training.large_batch import backward_large_batch
from training.losses import recall_at_k_surrogate

PIXELS = torch.randint(0, 256, (24, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) // 4


class NormEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8))
        self.double()

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(pixels.double() / 255), dim=1)


def score(rows: Tensor) -> tuple[Tensor, Tensor]:
    leaf = rows.clone().requires_grad_(True)
    loss = recall_at_k_surrogate(leaf, LABELS, rank_temperature=0.1)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def step(encoder: nn.Module, *, are_trained: bool, num_kept_chunks: int) -> None:
    norms = BatchNormStatistics(encoder.train(), are_trained=are_trained)
    norms.begin_step()
    backward_large_batch(encoder, PIXELS, score, chunk_size=8, num_kept_chunks=num_kept_chunks, seed=0)
    norms.end_step(World())


@pytest.mark.parametrize("num_kept_chunks", [0, 1, 3])
def test_trained_statistics_give_the_gradient_of_one_pass_and_move_once_a_step(num_kept_chunks: int) -> None:
    """The oracle: autograd keeps all chunks' graphs; the statistics are worked out from the norm's inputs."""
    encoder, oracle = NormEncoder(), NormEncoder().train()
    step(encoder, are_trained=True, num_kept_chunks=num_kept_chunks)
    chunks = PIXELS.split(8)
    recall_at_k_surrogate(torch.cat([oracle(chunk) for chunk in chunks]), LABELS, rank_temperature=0.1).backward()
    for found, wanted in zip(encoder.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-13)
    with torch.no_grad():
        inputs = [oracle.layers[0](chunk.double() / 255) for chunk in chunks]
    mean = torch.stack([values.mean(dim=(0, 2, 3)) for values in inputs]).mean(0)
    variance = torch.stack([values.transpose(0, 1).flatten(1).var(dim=1) for values in inputs]).mean(0)
    norm = encoder.layers[1]
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    assert int(norm.num_batches_tracked) == 1
    assert norm.momentum == 0.1


def test_frozen_norms_and_norms_of_frozen_stages_keep_their_statistics() -> None:
    for are_trained in (False, True):
        encoder = NormEncoder()
        encoder.layers[1].requires_grad_(not are_trained)
        before = {name: value.clone() for name, value in encoder.named_buffers()}
        step(encoder, are_trained=are_trained, num_kept_chunks=1)
        for name, value in encoder.named_buffers():
            assert torch.equal(value, before[name]), name
