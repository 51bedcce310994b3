"""Two passes over chunks against one graph of the whole batch, for whatever could differ between two passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lookalike.counter_random import counter_hash
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings
from training.large_batch import backward_large_batch, buffers_restored, freeze_batch_norm, num_chunks


class DropoutEncoder(nn.Module):
    """Convolution, batch norm, dropout and projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(72, 16)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        images = (pixels / 255 - 0.5).to(self.layers[0].weight.dtype)
        return nn.functional.normalize(self.layers(images), dim=1)


LABELS = torch.arange(24) // 4
PIXELS = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
PICTURES = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_(True)
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def loss_of(embeddings: Tensor) -> Tensor:
    """Any loss would do in which every picture meets every other one: here, cross-entropy of each class as a whole."""
    labels = LABELS[: len(embeddings)]
    logits = (embeddings @ embeddings.T / 0.1).fill_diagonal_(float("-inf"))
    is_other_class = labels[:, None] != labels
    return (logits.logsumexp(1) - logits.masked_fill(is_other_class, float("-inf")).logsumexp(1)).mean()


def gradients(encoder: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]


def prepared_encoder() -> DropoutEncoder:
    encoder = DropoutEncoder().double().train()
    freeze_batch_norm(encoder)
    return encoder


def real_encoder(*, drops: bool = True, trains_batch_norm: bool = False, checkpoints: bool = False) -> nn.Module:
    """A residual network with everything that training may switch on, in float64."""
    torch.manual_seed(0)
    rate = 0.3 if drops else 0.0
    settings = EncoderSettings(
        backbone="test_resnet", pooling="gem", projection_dim=16, drop_rate=rate, drop_path_rate=rate
    )
    encoder = create_encoder(settings).double().train()
    # Branches of a fresh network end in a zero: nothing that happens in them would be seen.
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if not trains_batch_norm:
        freeze_batch_norm(encoder)
    encoder.backbone.set_grad_checkpointing(checkpoints)
    return encoder


@contextmanager
def at_random_state(seed: int, index: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(counter_hash(seed, index)) >> 32)
        yield


def in_one_graph(encoder: nn.Module, pixels: Tensor, chunk_size: int, *, seed: int) -> Tensor:
    """The oracle: autograd itself keeps the graph of the whole batch, under the same masks and batch statistics."""
    parts = []
    for index, chunk in enumerate(pixels.split(chunk_size)):
        with at_random_state(seed, index):
            parts.append(encoder(chunk))
    loss = loss_of(torch.cat(parts))
    loss.backward()
    return loss.detach()


def assert_same_gradients(found: nn.Module, expected: nn.Module, *, rtol: float = 1e-10, atol: float = 1e-14) -> None:
    # float64: only the order of summation differs.
    assert len(gradients(found)) == len(list(found.parameters()))
    for one, other in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_size", [24, 8, 7, 1])
@pytest.mark.parametrize("num_kept_chunks", [0, 1, 2, 100])
def test_two_passes_give_the_gradient_of_one_with_dropout_active(chunk_size: int, num_kept_chunks: int) -> None:
    encoder, oracle = prepared_encoder(), prepared_encoder()
    loss, embeddings = backward_large_batch(
        encoder, PIXELS, score, chunk_size=chunk_size, num_kept_chunks=num_kept_chunks, seed=11
    )
    expected_loss = in_one_graph(oracle, PIXELS, chunk_size, seed=11)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert embeddings.shape == (24, 16)
    assert not embeddings.requires_grad
    assert_same_gradients(encoder, oracle)


@pytest.mark.parametrize("num_kept_chunks", [0, 1])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_network_that_draws_nothing_gets_the_gradient_of_one_call(checkpoints: bool, num_kept_chunks: int) -> None:
    encoder, oracle = real_encoder(drops=False, checkpoints=checkpoints), real_encoder(drops=False)
    loss, embeddings = backward_large_batch(
        encoder, PICTURES, score, chunk_size=5, num_kept_chunks=num_kept_chunks, seed=0
    )
    expected = oracle(PICTURES)
    expected_loss = loss_of(expected)
    expected_loss.backward()
    torch.testing.assert_close(embeddings, expected.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(encoder, oracle, atol=1e-12)


@pytest.mark.parametrize("num_kept_chunks", [0, 1, 3])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("trains_batch_norm", [False, True])
def test_masks_dropped_paths_and_statistics_are_those_of_one_pass(
    trains_batch_norm: bool, checkpoints: bool, num_kept_chunks: int
) -> None:
    encoder = real_encoder(trains_batch_norm=trains_batch_norm, checkpoints=checkpoints)
    oracle = real_encoder(trains_batch_norm=trains_batch_norm)
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    loss, _ = backward_large_batch(encoder, PICTURES, score, chunk_size=5, num_kept_chunks=num_kept_chunks, seed=7)
    expected_loss = in_one_graph(oracle, PICTURES, 5, seed=7)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_same_gradients(encoder, oracle, atol=1e-12)
    # The oracle ran forward once per chunk, so its running averages moved once per chunk.
    for (name, found), wanted in zip(encoder.named_buffers(), oracle.buffers(), strict=True):
        assert torch.equal(found, wanted), name
        if "running" in name:
            assert torch.equal(found, before[name]) != trains_batch_norm, name


@pytest.mark.parametrize("num_kept_chunks", [0, 1, 3])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("trains_batch_norm", [False, True])
@pytest.mark.parametrize("caller_autocasts", [False, True])
def test_bfloat16_is_the_same_in_both_passes_and_stays_inside_the_encoder(
    caller_autocasts: bool, trains_batch_norm: bool, checkpoints: bool, num_kept_chunks: int
) -> None:
    encoder = real_encoder(trains_batch_norm=trains_batch_norm, checkpoints=checkpoints).float()
    oracle = real_encoder(trains_batch_norm=trains_batch_norm).float()
    seen = []

    def watched_score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        similarities = embeddings @ embeddings.T
        loss, gradient = score(embeddings)
        seen.extend([embeddings.dtype, similarities.dtype, gradient.dtype])
        return loss, gradient

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=caller_autocasts):
        loss, _ = backward_large_batch(
            encoder,
            PICTURES,
            watched_score,
            chunk_size=5,
            num_kept_chunks=num_kept_chunks,
            seed=7,
            autocast=torch.bfloat16,
        )
    parts = []
    for index, chunk in enumerate(PICTURES.split(5)):
        with at_random_state(7, index), torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(oracle(chunk))
    expected_loss = loss_of(torch.cat(parts))
    expected_loss.backward()
    assert seen == [torch.float32] * 3
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-6, atol=0)
    # Chunks add up in another order. Each chunk's share was rounded to bfloat16 in the same way in both, so what
    # differs is of float32; a mask or a statistic that differs shows in the first digit.
    assert_same_gradients(encoder, oracle, rtol=1e-4, atol=1e-6)


def test_bfloat16_points_where_float32_points() -> None:
    encoder, oracle = real_encoder().float(), real_encoder().float()
    backward_large_batch(encoder, PICTURES, score, chunk_size=5, num_kept_chunks=1, seed=7, autocast=torch.bfloat16)
    in_one_graph(oracle, PICTURES, 5, seed=7)
    found, expected = (torch.cat([part.flatten() for part in gradients(one)]) for one in (encoder, oracle))
    # bfloat16 keeps 8 bits: 0.4% per rounding, some dozens of roundings, and random weights that average nothing out.
    assert float((found - expected).norm() / expected.norm()) < 0.2
    assert not torch.equal(found, expected)


def test_without_autocast_a_callers_autocast_has_no_effect() -> None:
    encoder, oracle = real_encoder().float(), real_encoder().float()
    for one, is_on in ((encoder, True), (oracle, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            backward_large_batch(one, PICTURES, score, chunk_size=5, num_kept_chunks=1, seed=7)
    assert_same_gradients(encoder, oracle, rtol=0, atol=0)


@pytest.mark.parametrize("trains_batch_norm", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_how_many_graphs_are_kept_changes_no_bit(autocast: torch.dtype | None, trains_batch_norm: bool) -> None:
    encoders = []
    for num_kept_chunks in (0, 1, 3):
        encoder = real_encoder(trains_batch_norm=trains_batch_norm).float()
        backward_large_batch(
            encoder, PICTURES, score, chunk_size=4, num_kept_chunks=num_kept_chunks, seed=7, autocast=autocast
        )
        encoders.append(encoder)
    for encoder in encoders[1:]:
        assert_same_gradients(encoder, encoders[0], rtol=0, atol=0)


@pytest.mark.slow
# torch 2.13's own compiler still uses it.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("num_kept_chunks", [0, 1, 3])
@pytest.mark.parametrize("trains_batch_norm", [False, True])
def test_a_compiled_encoder_gets_the_gradient_of_its_own_whole_batch(
    trains_batch_norm: bool, num_kept_chunks: int
) -> None:
    torch.compiler.reset()
    encoder, oracle = DropoutEncoder().double().train(), DropoutEncoder().double().train()
    if not trains_batch_norm:
        freeze_batch_norm(encoder)
        freeze_batch_norm(oracle)
    loss, _ = backward_large_batch(
        torch.compile(encoder),
        PIXELS,
        score,
        chunk_size=8,
        num_kept_chunks=num_kept_chunks,
        seed=7,
        is_compiled=True,
    )
    # Compiled code draws other masks than the plain one, hence the oracle is compiled, too.
    parts, compiled_oracle = [], torch.compile(oracle)
    for index, chunk in enumerate(PIXELS.split(8)):
        with at_random_state(7, index):
            parts.append(compiled_oracle(chunk))
    expected_loss = loss_of(torch.cat(parts))
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(encoder, oracle)
    for found, wanted in zip(encoder.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_compiled_encoder_runs_one_program_and_keeps_no_graph_it_was_not_told_to_keep() -> None:
    encoder, has_graph = prepared_encoder(), []
    encoder.register_forward_hook(lambda module, inputs, output: has_graph.append(output.requires_grad))
    backward_large_batch(encoder, PIXELS, score, chunk_size=8, num_kept_chunks=0, seed=1, is_compiled=True)
    oracle = prepared_encoder()
    backward_large_batch(oracle, PIXELS, score, chunk_size=8, num_kept_chunks=0, seed=1)
    assert has_graph == [True] * 6
    assert_same_gradients(encoder, oracle, rtol=0, atol=0)


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


def test_buffers_are_restored_when_a_pass_fails() -> None:
    encoder = DropoutEncoder().train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}

    def pass_that_fails() -> None:
        with buffers_restored(encoder):
            encoder(PIXELS)
            raise KeyError

    with pytest.raises(KeyError):
        pass_that_fails()
    assert int(encoder.layers[1].num_batches_tracked) == 0
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("num_kept_chunks", [0, 2, 9])
def test_a_back_end_gets_every_chunk_in_order_and_learns_which_is_the_last(num_kept_chunks: int) -> None:
    encoder, oracle = prepared_encoder(), prepared_encoder()
    calls = []

    def surrogate_backward(embeddings: Tensor, gradient: Tensor, is_last: bool) -> None:
        calls.append((len(embeddings), is_last))
        (embeddings * gradient).sum().backward()

    backward_large_batch(
        encoder,
        PIXELS,
        score,
        chunk_size=7,
        num_kept_chunks=num_kept_chunks,
        seed=11,
        backward_chunk=surrogate_backward,
    )
    in_one_graph(oracle, PIXELS, 7, seed=11)
    assert calls == [(7, False), (7, False), (7, False), (3, True)]
    assert len(calls) == num_chunks(len(PIXELS), 7)
    assert_same_gradients(encoder, oracle)


@pytest.mark.parametrize("num_pictures", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 20])
def test_the_number_of_chunks_is_what_splitting_gives(num_pictures: int, chunk_size: int) -> None:
    assert num_chunks(num_pictures, chunk_size) == len(torch.zeros(num_pictures).split(chunk_size))


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    encoder = prepared_encoder()
    with pytest.raises(ValueError, match="chunk_size 0 must be 1 or more"):
        backward_large_batch(encoder, PIXELS, score, chunk_size=0, num_kept_chunks=0, seed=0)
    with pytest.raises(ValueError, match="num_kept_chunks -1"):
        backward_large_batch(encoder, PIXELS, score, chunk_size=8, num_kept_chunks=-1, seed=0)
    with pytest.raises(ValueError, match="use bfloat16"):
        backward_large_batch(encoder, PIXELS, score, chunk_size=8, num_kept_chunks=0, seed=0, autocast=torch.float16)


def test_a_gradient_in_another_precision_or_shape_is_refused() -> None:
    encoder = prepared_encoder()
    for wrong in (lambda rows: rows.bfloat16(), lambda rows: rows[:-1]):
        with pytest.raises(ValueError, match="they must be alike"):
            backward_large_batch(
                encoder,
                PIXELS,
                lambda rows, wrong=wrong: (rows.sum(), wrong(rows)),
                chunk_size=8,
                num_kept_chunks=0,
                seed=0,
            )
