"""Recall@k surrogate: the share of a query's positives among its k nearest, made smooth, and 1 minus it as a loss.

    L(q) = 1 - mean over k of Σ_x σ((k - r(q, x)) / τ_k) / |P(q)|,    x over the positives P(q), r their smooth ranks

Two definitions are offered. `"paper"` is the formula above. `"released"` gives the values of the code its authors
released, which differs in three ways: the query takes part in its own ranked list, so that the nearest positive has
rank 2 at best; the sum is cut off at k; and it is divided by min(k, |P(q)|), as recall@k is.

Neither loss is 0 at a perfect ranking: log `loss - surrogate_floor(...)`.

Source: Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022,
arXiv:2108.11179, eq. 5 to 8; with similarity mixup, eq. 9 and 10.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.losses.mixing import mix, mixing_pairs
from training.losses.smooth_ranks import RankLoss, smooth_rank_loss

Definition = Literal["paper", "released"]


def recall_at_k_surrogate(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    k_temperature: float | Sequence[float] = 1.0,
    definition: Definition = "paper",
    mixing: Float[Tensor, "pairs"] | None = None,
    query_share: tuple[int, int] = (0, 1),
) -> Float[Tensor, ""]:
    """The loss of `recall_at_k_with_gradient`, to call `backward()` on, once.

    Its arguments and errors are those of that function. The gradient is worked out together with the loss and kept
    until the backward pass, which only scales it; a gradient of the gradient is refused. Without a graph to build
    (`torch.no_grad`, embeddings that need no gradient) only the loss is worked out.
    """
    with_gradient = torch.is_grad_enabled() and embeddings.requires_grad
    result = recall_at_k_with_gradient(
        embeddings.detach(),
        labels,
        ks=ks,
        rank_temperature=rank_temperature,
        k_temperature=k_temperature,
        definition=definition,
        mixing=mixing,
        query_share=query_share,
        with_gradient=with_gradient,
    )
    return _KnownGradient.apply(embeddings, result.loss, result.gradient) if with_gradient else result.loss


def recall_at_k_with_gradient(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    k_temperature: float | Sequence[float] = 1.0,
    definition: Definition = "paper",
    mixing: Float[Tensor, "pairs"] | None = None,
    query_share: tuple[int, int] = (0, 1),
    with_gradient: bool = True,
) -> RankLoss:
    """Mean recall@k surrogate of a batch and its gradient by every embedding, without autograd.

    Each row is a query against all others. A row that is alone in its class is no query, but is in the gallery of the
    others; in a batch of such rows, loss and gradient are 0.

    Args:
        embeddings: Usually of unit length; similarities are inner products. Half precision is computed in float32,
            and autocast does not apply: similarities in 16 bits would be off by several `rank_temperature`.
        labels: Class of each row, in any order; any number of rows per class.
        ks: Depths at which recall is measured; one above the batch size counts as the batch size.
        rank_temperature: τ of the ranks, in units of similarity; above 0.
        k_temperature: τ_k, in ranks, above 0; one for all or one per k.
        definition: See above.
        mixing: None, or one coefficient a per row (i, j) of `mixing_pairs(labels)`, in [0, 1]: virtual samples
            a * embeddings[i] + (1 - a) * embeddings[j], not normalised again, join the batch in every role. They are
            treated as constants.
        query_share: (worker, number of workers): only that worker's part of the queries, and still a gradient by
            every embedding. Losses and gradients of all workers add up to those of the batch.
        with_gradient: False saves the time for it.

    Returns:
        In float64 for float64, else in float32.

    Raises:
        ValueError: an argument is outside what is said above.

    Memory and time: see `smooth_rank_loss`; at 4096 rows of 512 about 30 MB above the arguments.
    """
    _check(embeddings, labels, rank_temperature=rank_temperature, definition=definition, query_share=query_share)
    recall = _recall(ks, k_temperature, definition, batch=len(labels))
    dtype = embeddings.dtype if embeddings.dtype == torch.float64 else torch.float32
    mixture = None
    if mixing is not None:
        pairs = mixing_pairs(labels)
        _check_mixing(mixing, num_pairs=len(pairs))
        mixture = mix(pairs, mixing.to(dtype), num_images=len(labels))
        labels = labels[mixture.parents[:, 0]]
    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
        return smooth_rank_loss(
            embeddings.to(dtype),
            labels,
            recall,
            rank_temperature=rank_temperature,
            ranks_query_itself=definition == "released",
            mixture=mixture,
            query_share=query_share,
            with_gradient=with_gradient,
        )


def surrogate_floor(
    labels: Int[Tensor, "batch"],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    k_temperature: float | Sequence[float] = 1.0,
    definition: Definition = "paper",
    is_mixed: bool = False,
) -> float:
    """The loss at a perfect ranking: all positives of a query before all else, no two equally near.

    In the released definition, the query itself comes before them. `is_mixed` is for losses with `mixing`.

    Raises:
        ValueError: as the loss, for the same arguments.
    """
    recall = _recall(ks, k_temperature, definition, batch=len(labels))
    _, class_sizes = labels.unique(return_counts=True)
    sample_sizes = class_sizes * (class_sizes + 1) // 2 if is_mixed else class_sizes
    total, num_queries = 0.0, 0
    for size, num_classes in zip(*(part.tolist() for part in sample_sizes.unique(return_counts=True)), strict=True):
        if size > 1:
            first_rank = 2 if definition == "released" else 1
            ranks = torch.arange(first_rank, first_rank + size - 1, dtype=torch.float64)[None]
            losses, _ = recall(ranks, torch.ones_like(ranks, dtype=torch.bool))
            total += num_classes * size * float(losses)
            num_queries += num_classes * size
    return total / max(num_queries, 1)


@dataclass(frozen=True, slots=True)
class _Recall:
    """1 - the mean over k of smooth recall@k, as a function of smooth ranks."""

    ks: tuple[int, ...]
    temperatures: tuple[float, ...]
    definition: Definition

    def __call__(
        self, ranks: Float[Tensor, "queries positives"], is_positive: Bool[Tensor, "queries positives"]
    ) -> tuple[Float[Tensor, "queries"], Float[Tensor, "queries positives"]]:
        num_positives = is_positive.sum(1)
        losses = torch.ones_like(ranks[:, 0])
        slopes = torch.zeros_like(ranks)
        for k, temperature in zip(self.ks, self.temperatures, strict=True):
            hits = torch.sigmoid((k - ranks) / temperature) * is_positive
            hit_slopes = hits * (1 - hits) / temperature
            found = hits.sum(1)
            most = num_positives
            if self.definition == "released":
                hit_slopes *= (found <= k)[:, None]
                found = found.clamp(max=k)
                most = num_positives.clamp(max=k)
            losses -= found / most / len(self.ks)
            slopes += hit_slopes / most[:, None] / len(self.ks)
        return losses, slopes


class _KnownGradient(torch.autograd.Function):
    """Gives a loss that is already computed its place in the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Float[Tensor, "batch dim"],
        loss: Float[Tensor, ""],
        gradient: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(gradient)
        ctx.dtype = embeddings.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, loss_gradient: Float[Tensor, ""]) -> tuple[Float[Tensor, "batch dim"], None, None]:
        # Autograd builds a graph of a backward pass only to differentiate it again; this one would pass for a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("recall_at_k_surrogate has no second derivative: leave out create_graph=True")
        (gradient,) = ctx.saved_tensors
        # Scaled before it is narrowed: a loss scale exists to keep small gradients representable in half precision.
        return (gradient * loss_gradient).to(ctx.dtype), None, None


def _recall(
    ks: Sequence[int], k_temperature: float | Sequence[float], definition: Definition, *, batch: int
) -> _Recall:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be one or more numbers from 1 up, got {tuple(ks)}")
    temperatures = tuple(k_temperature) if isinstance(k_temperature, Sequence) else (k_temperature,) * len(ks)
    if len(temperatures) != len(ks):
        raise ValueError(f"k_temperature must be one number or one per k, got {len(temperatures)} for {len(ks)} ks")
    for temperature in temperatures:
        _check_temperature("k_temperature", temperature)
    return _Recall(ks=tuple(min(k, batch) for k in ks), temperatures=temperatures, definition=definition)


def _check(
    embeddings: Tensor, labels: Tensor, *, rank_temperature: float, definition: str, query_share: tuple[int, int]
) -> None:
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
    _check_temperature("rank_temperature", rank_temperature)
    if definition not in get_args(Definition):
        raise ValueError(f"definition must be one of {get_args(Definition)}, got {definition!r}")
    worker, num_workers = query_share
    if not 0 <= worker < num_workers:
        raise ValueError(f"query_share must be (worker, number of workers), 0 <= worker < number, got {query_share}")


def _check_temperature(name: str, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name} must be finite and above 0, got {temperature}")


def _check_mixing(mixing: Tensor, *, num_pairs: int) -> None:
    if mixing.shape != (num_pairs,):
        raise ValueError(
            f"mixing must hold one coefficient for each of the {num_pairs} pairs of mixing_pairs(labels), "
            f"got shape {tuple(mixing.shape)}"
        )
    # Negated, so that NaN is refused too.
    if not bool(((mixing >= 0) & (mixing <= 1)).all()):
        raise ValueError("mixing coefficients must lie in [0, 1]")
