"""The gradient of a batch larger than memory, in two passes over its chunks.

Pass one embeds every chunk without a graph, the loss gives the gradient with respect to the embeddings, pass two
embeds each chunk again with a graph and feeds that gradient back. Both passes see the same pixels, the same random
state and the same normalisation statistics, so the result is the gradient of the whole batch at once. The graphs
of some chunks may be kept from pass one where memory allows; only the others are embedded twice.

Source: Patel, Tolias, Matas 2022, arXiv:2108.11179, section 3.4 (large batches); Gao et al. 2021,
arXiv:2101.06983 (gradient caching). Keeping part of the graphs is ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lookalike.counter_random import counter_hash

# Own embeddings of the batch -> (loss, gradient of the loss with respect to them).
ScoreEmbeddings = Callable[[Tensor], tuple[Tensor, Tensor]]


def backward_large_batch(
    encoder: nn.Module,
    pixels: UInt8[Tensor, "batch 3 height width"],
    score: ScoreEmbeddings,
    *,
    chunk_size: int,
    num_kept_chunks: int,
    seed: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch dim"]]:
    """Adds the loss gradient to the encoder's parameters; returns the loss and the embeddings.

    Args:
        encoder: In training mode; must not update statistics in its forward pass (see `freeze_batch_norm`).
        pixels: Of this process; moved to the encoder's device chunk by chunk.
        score: Receives all embeddings as a leaf without history.
        chunk_size: Images per forward pass, at least 1.
        num_kept_chunks: The first so many chunks keep their graph and skip the second pass.
        seed: Of dropout and stochastic depth: the same in both passes, another one for each step and process.
    """
    chunks = pixels.split(chunk_size)
    first_pass = []
    for index, chunk in enumerate(chunks):
        with _seeded(seed, index, chunk_device(encoder)), torch.set_grad_enabled(index < num_kept_chunks):
            first_pass.append(encoder(chunk.to(chunk_device(encoder))))
    embeddings = torch.cat([part.detach() for part in first_pass])
    loss, gradient = score(embeddings)
    for index, (chunk, chunk_gradient) in enumerate(zip(chunks, gradient.split(chunk_size), strict=True)):
        if index < num_kept_chunks:
            part = first_pass[index]
        else:
            with _seeded(seed, index, chunk_device(encoder)):
                part = encoder(chunk.to(chunk_device(encoder)))
        part.backward(chunk_gradient)
    return loss, embeddings


def freeze_batch_norm(encoder: nn.Module) -> None:
    """Puts batch norms in evaluation mode: they use stored statistics, and two passes cannot update them twice."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def chunk_device(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device


@contextmanager
def _seeded(seed: int, chunk: int, device: torch.device) -> Iterator[None]:
    """Runs a block under its own random state and leaves the global one as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # The CPU's generator uses 32 bits of its seed: hashed, so that they depend on all bits of both.
        torch.manual_seed(int(counter_hash(seed, chunk)) >> 32)
        yield
