"""The gradient of a batch larger than memory, in two passes over its chunks.

Pass one embeds every chunk without a graph, the loss gives the gradient with respect to the embeddings, pass two
embeds each chunk again with a graph and feeds that gradient back. Both passes see the same pixels, the same random
state and the same normalisation statistics, so the result is the gradient of the whole batch at once. The graphs
of some chunks may be kept from pass one where memory allows; only the others are embedded twice.

A batch norm in training mode normalises a chunk by the chunk's own statistics, in both passes: the result then is the
gradient of the whole batch normalised in groups of `chunk_size`. Its running averages move in pass one only.

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
# (embeddings of a chunk, gradient of the loss with respect to them, is this the last chunk of the batch?)
BackwardChunk = Callable[[Tensor, Tensor, bool], None]


def backward_plain(embeddings: Float[Tensor, "chunk dim"], gradient: Float[Tensor, "chunk dim"], is_last: bool) -> None:
    """Adds to the parameters' gradients, and tells no one."""
    embeddings.backward(gradient)


def backward_large_batch(
    encoder: nn.Module,
    pixels: UInt8[Tensor, "batch 3 height width"],
    score: ScoreEmbeddings,
    *,
    chunk_size: int,
    num_kept_chunks: int,
    seed: int,
    autocast: torch.dtype | None = None,
    is_compiled: bool = False,
    backward_chunk: BackwardChunk = backward_plain,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch dim"]]:
    """Adds the loss gradient to the encoder's parameters; returns the loss and the embeddings.

    Args:
        encoder: In the mode it trains in. Its random numbers must be torch's. What a forward pass changes in buffers
            counts once (batch norm's running averages: once per chunk), and must not change what it returns.
        pixels: Of this process; moved to the encoder's device chunk by chunk.
        score: Receives all embeddings, in float32 or wider, as a leaf without history and outside autocast.
        chunk_size: Images per forward pass, at least 1.
        num_kept_chunks: The first so many chunks keep their graph and skip the second pass. Changes no bit of the
            result where the encoder's arithmetic repeats itself.
        seed: Of dropout and stochastic depth: the same in both passes, another one for each step and process.
        autocast: Type of the encoder's arithmetic, e.g. bfloat16; None computes in the type of its weights, also
            within a caller's autocast.
        is_compiled: Set for an encoder that went through torch.compile: pass one then builds graphs, too, and drops
            them, so that one program serves both passes. Two could draw other random numbers and round differently.
            The mode "reduce-overhead" is not for kept graphs: it overwrites what they hold.
        backward_chunk: How a chunk's gradient goes back, for back ends that synchronise with the last chunk. The
            order of calls depends on `num_chunks` and `num_kept_chunks` alone: ranks that agree on both, agree on it.

    Raises:
        ValueError: a size is out of range, `autocast` needs a loss scale, or `score` returns a gradient of another
            shape or type than the embeddings.
    """
    if chunk_size < 1 or num_kept_chunks < 0:
        raise ValueError(f"chunk_size {chunk_size} must be 1 or more, num_kept_chunks {num_kept_chunks} 0 or more")
    if autocast == torch.float16:
        raise ValueError("autocast to float16 needs a scaled loss, which is not offered: use bfloat16")
    # A caller's autocast would reach the loss and the backward passes.
    with torch.autocast(chunk_device(encoder).type, enabled=False):
        chunks = pixels.split(chunk_size)
        kept, parts = [], []
        for index, chunk in enumerate(chunks):
            with torch.set_grad_enabled(is_compiled or index < num_kept_chunks):
                part = embed_chunk(encoder, chunk, seed=seed, index=index, autocast=autocast)
            if index < num_kept_chunks:
                kept.append(part)
            parts.append(part.detach())
            del part  # or the next chunk would find a compiled encoder's graph in memory
        embeddings = torch.cat(parts)
        del parts

        with buffers_restored(encoder):
            loss, gradient = _checked_score(score, embeddings)
            for index, (chunk, chunk_gradient) in enumerate(zip(chunks, gradient.split(chunk_size), strict=True)):
                if index < num_kept_chunks:
                    part = kept.pop(0)
                else:
                    part = embed_chunk(encoder, chunk, seed=seed, index=index, autocast=autocast)
                backward_chunk(part, chunk_gradient, index == len(chunks) - 1)
                del part  # its graph is used up; what hangs on it must not wait for the next chunk's
    return loss, embeddings


def embed_chunk(
    encoder: nn.Module,
    pixels: UInt8[Tensor, "chunk 3 height width"],
    *,
    seed: int,
    index: int,
    autocast: torch.dtype | None = None,
) -> Float[Tensor, "chunk dim"]:
    """Embeddings in float32 or wider under the random state of chunk `index`, which alone decides what is drawn."""
    device = chunk_device(encoder)
    # Without the cache of converted weights: older versions of torch put there what pass one converts without a graph,
    # and pass two would find it.
    with (
        _seeded(seed, index, device),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False),
    ):
        embeddings = encoder(pixels.to(device))
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def num_chunks(num_pictures: int, chunk_size: int) -> int:
    """Forward passes over so many pictures. Back ends whose every pass is collective need the same on all ranks."""
    return -(-num_pictures // chunk_size)


def freeze_batch_norm(encoder: nn.Module) -> None:
    """Puts batch norms in evaluation mode: they use stored statistics, which then no pass updates."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def chunk_device(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device


@contextmanager
def buffers_restored(encoder: nn.Module) -> Iterator[None]:
    """Takes back what forward and backward passes in the block do to buffers, such as running averages.

    A backward pass changes them where it recomputes a part of the forward pass (gradient checkpointing).
    """
    buffers = [buffer for module in encoder.modules() if module.training for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _checked_score(
    score: ScoreEmbeddings, embeddings: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch dim"]]:
    loss, gradient = score(embeddings)
    if gradient.shape != embeddings.shape or gradient.dtype != embeddings.dtype:
        raise ValueError(
            f"the gradient of the loss is {gradient.dtype} {tuple(gradient.shape)}, "
            f"the embeddings are {embeddings.dtype} {tuple(embeddings.shape)}: they must be alike"
        )
    return loss, gradient


@contextmanager
def _seeded(seed: int, chunk: int, device: torch.device) -> Iterator[None]:
    """Runs a block under its own random state and leaves the global one as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # The CPU's generator uses 32 bits of its seed: hashed, so that they depend on all bits of both.
        torch.manual_seed(int(counter_hash(seed, chunk)) >> 32)
        yield
