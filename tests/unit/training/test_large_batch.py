import pytest
import torch
from torch import Tensor, nn

from lookalike.counter_random import counter_hash
from training.large_batch import backward_large_batch, freeze_batch_norm
from training.losses import recall_at_k_surrogate


class DropoutEncoder(nn.Module):
    """Convolution, frozen batch norm, dropout and projection: whatever could differ between two passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(72, 16)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(pixels.double() / 255 - 0.5), dim=1)


LABELS = torch.arange(24) // 4
PIXELS = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_(True)
    loss = recall_at_k_surrogate(leaf, LABELS, rank_temperature=0.1)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def gradients(encoder: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]


def prepared_encoder() -> DropoutEncoder:
    encoder = DropoutEncoder().double().train()
    freeze_batch_norm(encoder)
    return encoder


def one_pass(chunk_size: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The oracle: every chunk's graph is kept by autograd itself, under the same dropout masks."""
    encoder = prepared_encoder()
    parts = []
    for index, chunk in enumerate(PIXELS.split(chunk_size)):
        torch.manual_seed(int(counter_hash(seed, index)) >> 32)
        parts.append(encoder(chunk))
    loss = recall_at_k_surrogate(torch.cat(parts), LABELS, rank_temperature=0.1)
    loss.backward()
    return loss.detach(), gradients(encoder)


@pytest.mark.parametrize("chunk_size", [24, 8, 7, 1])
@pytest.mark.parametrize("num_kept_chunks", [0, 1, 2, 100])
def test_two_passes_give_the_gradient_of_one_with_dropout_active(chunk_size: int, num_kept_chunks: int) -> None:
    encoder = prepared_encoder()
    loss, embeddings = backward_large_batch(
        encoder, PIXELS, score, chunk_size=chunk_size, num_kept_chunks=num_kept_chunks, seed=11
    )
    expected_loss, expected = one_pass(chunk_size, seed=11)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert embeddings.shape == (24, 16)
    assert not embeddings.requires_grad
    for found, wanted in zip(gradients(encoder), expected, strict=True):
        # float64: the bound asked for is 1e-6; only the order of summation differs.
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_dropout_differs_between_seeds_and_chunks_and_leaves_the_global_state_alone() -> None:
    encoder = prepared_encoder()
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    same_picture_twice = PIXELS[:1].expand(2, -1, -1, -1)
    results = []
    for seed in (1, 2):
        _, embeddings = backward_large_batch(
            encoder,
            same_picture_twice,
            lambda rows: (rows.sum(), torch.ones_like(rows)),
            chunk_size=1,
            num_kept_chunks=0,
            seed=seed,
        )
        results.append(embeddings)
    assert torch.equal(torch.rand(1), expected_draw)
    rows = torch.cat(results)
    distances = torch.cdist(rows, rows) + 10 * torch.eye(4)
    assert float(distances.min()) > 1e-3


def test_batch_norm_statistics_stay_as_they_were() -> None:
    encoder = prepared_encoder()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    backward_large_batch(encoder, PIXELS, score, chunk_size=8, num_kept_chunks=1, seed=0)
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name
