import importlib.util
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from lookalike.encoder import Encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training.backend_settings import BackendSettings
from training.distributed_loss import score_across_ranks
from training.large_batch import ScoreEmbeddings
from training.losses.batch_loss import BatchLoss, LossShare
from training.verify_gradients import GradientCheck, verify_gradients

NUM_IMAGES = 12


class Softmax(BatchLoss):
    """Mean over the queries of the cross-entropy of what shares their label; split by queries."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        leaf = embeddings.detach().requires_grad_(True)
        own = torch.arange(share[0], len(leaf), share[1])
        scores = torch.log_softmax(10 * leaf[own] @ leaf.T, dim=1)
        part = -self.factor * scores[labels[own][:, None] == labels].sum() / len(leaf)
        (gradient,) = torch.autograd.grad(part, leaf)
        return LossShare(part.detach(), gradient)


def verify(world: World, tree: dict[str, Any], mistake: float) -> list[GradientCheck]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5))
    settings = EncoderSettings(backbone="small", pooling="gem", projection_dim=8, drop_rate=0.2)
    encoder = Encoder(settings, backbone, num_features=8)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(NUM_IMAGES) // 4  # classes straddle the ranks
    size = NUM_IMAGES // world.size
    own = slice(world.rank * size, (world.rank + 1) * size)

    def make_score(classes: Tensor, among: World) -> ScoreEmbeddings:
        loss = Softmax(mistake if among.size > 1 else 1.0)

        def score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
            scored = score_across_ranks(embeddings, classes, loss, step=0, world=among)
            return scored.loss, scored.gradient

        return score

    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    checks = verify_gradients(
        encoder,
        pixels[own],
        labels[own],
        make_score,
        lambda trained: torch.optim.SGD(trained.parameters(), lr=0.1),
        backend=TypeAdapter(BackendSettings).validate_python(tree),
        chunk_size=3,
        num_kept_chunks=1,
        world=world,
    )
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    return checks


GROUPS = ["backbone.0", "backbone.1", "pool.power", "projection.0", "projection.1"]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    "tree", [{"name": "single"}, {"name": "ddp"}, {"name": "fsdp2"}], ids=lambda tree: tree["name"]
)
def test_a_right_back_end_passes_in_both_precisions_on_every_rank(tree: dict[str, Any], num_ranks: int) -> None:
    results = run_on_ranks(verify, num_ranks, tree, 1.0)
    assert all(checks == results[0] for checks in results)
    assert [check.precision for check in results[0]] == ["float32", "float64"]
    for check in results[0]:
        assert check.has_passed, check.lines()
        assert list(check.differences) == GROUPS
        assert check.num_processes == num_ranks


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_passes_in_the_precision_it_has(stage: int) -> None:
    for [check] in run_on_ranks(verify, 2, {"name": "deepspeed", "zero_stage": stage}, 1.0):
        assert check.precision == "float32"
        assert check.has_passed, check.lines()


def test_a_forgotten_factor_fails_on_every_rank() -> None:
    for checks in run_on_ranks(verify, 2, {"name": "ddp"}, 0.5):
        for check in checks:
            assert not check.has_passed
            assert check.differences == pytest.approx(dict.fromkeys(GROUPS, 0.5), rel=1e-3)
            assert check.lines()[-1].startswith("FAILED: backend ddp over 2 processes")


def test_what_is_not_a_number_has_not_passed() -> None:
    assert not GradientCheck("ddp", 2, "float32", {"backbone": float("nan")}).has_passed


def test_chunks_that_one_process_would_cut_otherwise_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size 5 must divide the process's batch of 4"):
        verify_gradients(
            Encoder(EncoderSettings(backbone="small"), nn.Flatten(), num_features=3),
            torch.zeros(4, 3, 1, 1, dtype=torch.uint8),
            torch.zeros(4, dtype=torch.int64),
            lambda labels, among: lambda rows: (rows.sum(), rows),
            lambda trained: torch.optim.SGD(trained.parameters(), lr=0.1),
            backend=TypeAdapter(BackendSettings).validate_python({"name": "single"}),
            chunk_size=5,
            world=World(),
        )
