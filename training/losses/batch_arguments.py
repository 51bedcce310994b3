"""What every loss on a batch asks of its arguments, and how it takes them."""

import math

import torch
from torch import Tensor


def check_batch(embeddings: Tensor, labels: Tensor, *, query_share: tuple[int, int]) -> None:
    """Raises ValueError, unless they are floating point [batch, dim], integers [batch], and a share that exists."""
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be floating point, got {embeddings.dtype}")
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"embeddings must be [batch, dim] and labels [batch] with a batch of 1 or more, "
            f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.device != embeddings.device:
        raise ValueError(
            f"labels must be integers on the device of the embeddings, {embeddings.device}, "
            f"got {labels.dtype} on {labels.device}"
        )
    worker, num_workers = query_share
    if not 0 <= worker < num_workers:
        raise ValueError(f"query_share must be (worker, number of workers), 0 <= worker < number, got {query_share}")


def check_above_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def precision_of(embeddings: Tensor) -> torch.dtype:
    """float64 for float64, else float32: similarities in 16 bits would be off by several temperatures."""
    return embeddings.dtype if embeddings.dtype == torch.float64 else torch.float32
