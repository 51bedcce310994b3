"""Recall@k surrogate: the share of a query's positives among its k nearest, made smooth, and 1 minus it as a loss.

    L(q) = 1 - mean over k of Σ_x σ((k - r(q, x)) / τ_k) / |P(q)|,    x over the positives P(q), r their smooth ranks

Two definitions are offered. `"paper"` is the formula above. `"released"` gives the values of the code its authors
released, which differs in three ways: the query takes part in its own ranked list, so that the nearest positive has
rank 2 at best; the sum is cut off at k; and it is divided by min(k, |P(q)|), as recall@k is.

Neither loss is 0 at a perfect ranking: log `loss - surrogate_floor(...)`.

Source: Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022,
arXiv:2108.11179, eq. 5 to 8; with similarity mixup, eq. 9 and 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training.losses.batch_arguments import check_above_zero
from training.losses.batch_rank_loss import batch_rank_loss
from training.losses.known_gradient import with_known_gradient
from training.losses.mixing import Mixing, PairMixing
from training.losses.smooth_ranks import LossAtRanks, RankLoss, Ranks

Definition = Literal["paper", "released"]


def recall_at_k_surrogate(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    k_temperature: float | Sequence[float] = 1.0,
    definition: Definition = "paper",
    mixing: Mixing | None = None,
    query_share: tuple[int, int] = (0, 1),
) -> Float[Tensor, ""]:
    """The loss of `recall_at_k_with_gradient`, to call `backward()` on, once.

    Its arguments and errors are those of that function; for the rest see `with_known_gradient`.
    """
    return with_known_gradient(
        lambda rows, with_gradient: recall_at_k_with_gradient(
            rows,
            labels,
            ks=ks,
            rank_temperature=rank_temperature,
            k_temperature=k_temperature,
            definition=definition,
            mixing=mixing,
            query_share=query_share,
            with_gradient=with_gradient,
        ),
        embeddings,
    )


def recall_at_k_with_gradient(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    k_temperature: float | Sequence[float] = 1.0,
    definition: Definition = "paper",
    mixing: Mixing | None = None,
    query_share: tuple[int, int] = (0, 1),
    with_gradient: bool = True,
) -> RankLoss:
    """Mean recall@k surrogate of a batch and its gradient by every embedding, without autograd.

    Each row is a query against all others. A row that is alone in its class is no query, but is in the gallery of the
    others; in a batch of such rows, loss and gradient are 0.

    Args:
        embeddings: See `batch_rank_loss` for this and all that is not said here.
        labels: Class of each row, in any order; any number of rows per class.
        ks: Depths at which recall is measured; one above the batch size counts as the batch size.
        k_temperature: τ_k, in ranks, above 0; one for all or one per k.
        definition: See above.

    Returns:
        In float64 for float64, else in float32.

    Raises:
        ValueError: an argument is outside what is said above.

    Memory and time: see `smooth_rank_loss`; at 4096 rows of 512 about 30 MB above the arguments.
    """
    return batch_rank_loss(
        embeddings,
        labels,
        _recall(ks, k_temperature, definition, batch=len(labels)),
        rank_temperature=rank_temperature,
        ranks_query_itself=definition == "released",
        mixing=mixing,
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
    mixing: PairMixing | None = None,
) -> float:
    """The loss at a perfect ranking: all positives of a query before all else, no two equally near.

    In the released definition, the query itself comes before them. `is_mixed` is for losses with all pairs mixed,
    `mixing` for those with some of them.

    Raises:
        ValueError: as the loss, for the same arguments.
    """
    recall = _recall(ks, k_temperature, definition, batch=len(labels))
    if mixing is not None:
        labels = torch.cat([labels, labels[mixing.pairs[:, 0]]])
    _, class_sizes = labels.unique(return_counts=True)
    sample_sizes = class_sizes * (class_sizes + 1) // 2 if is_mixed and mixing is None else class_sizes
    total, num_queries = 0.0, 0
    for size, num_classes in zip(*(part.tolist() for part in sample_sizes.unique(return_counts=True)), strict=True):
        if size > 1:
            first_rank = 2 if definition == "released" else 1
            ranks = torch.arange(first_rank, first_rank + size - 1, dtype=torch.float64)[None]
            at = Ranks(ranks, torch.ones_like(ranks, dtype=torch.bool), thresholds=-ranks, temperature=0.01)
            total += num_classes * size * float(recall(at).losses)
            num_queries += num_classes * size
    return total / max(num_queries, 1)


@dataclass(frozen=True, slots=True)
class _Recall:
    """1 - the mean over k of smooth recall@k, as a function of smooth ranks."""

    ks: tuple[int, ...]
    temperatures: tuple[float, ...]
    definition: Definition

    def __call__(self, at: Ranks) -> LossAtRanks:
        ranks = at.among_all
        num_positives = at.is_positive.sum(1)
        losses = torch.ones_like(ranks[:, 0])
        slopes = torch.zeros_like(ranks)
        for k, temperature in zip(self.ks, self.temperatures, strict=True):
            hits = torch.sigmoid((k - ranks) / temperature) * at.is_positive
            hit_slopes = hits * (1 - hits) / temperature
            found = hits.sum(1)
            most = num_positives
            if self.definition == "released":
                hit_slopes *= (found <= k)[:, None]
                found = found.clamp(max=k)
                most = num_positives.clamp(max=k)
            losses -= found / most / len(self.ks)
            slopes += hit_slopes / most[:, None] / len(self.ks)
        return LossAtRanks(losses, slopes)


def _recall(
    ks: Sequence[int], k_temperature: float | Sequence[float], definition: Definition, *, batch: int
) -> _Recall:
    if definition not in get_args(Definition):
        raise ValueError(f"definition must be one of {get_args(Definition)}, got {definition!r}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be one or more numbers from 1 up, got {tuple(ks)}")
    temperatures = tuple(k_temperature) if isinstance(k_temperature, Sequence) else (k_temperature,) * len(ks)
    if len(temperatures) != len(ks):
        raise ValueError(f"k_temperature must be one number or one per k, got {len(temperatures)} for {len(ks)} ks")
    for temperature in temperatures:
        check_above_zero("k_temperature", temperature)
    return _Recall(ks=tuple(min(k, batch) for k in ks), temperatures=temperatures, definition=definition)
