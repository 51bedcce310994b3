"""A loss of smooth ranks on a batch as it comes: of any precision, with or without similarity mixup."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training.losses.batch_arguments import check_above_zero, check_batch, precision_of
from training.losses.mixing import Mixing, PairMixing, mix, mixing_pairs
from training.losses.smooth_ranks import LossOfRanks, RankLoss, smooth_rank_loss


def batch_rank_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    loss_of_ranks: LossOfRanks,
    *,
    rank_temperature: float,
    ranks_query_itself: bool = False,
    mixing: Mixing | None = None,
    query_share: tuple[int, int] = (0, 1),
    with_gradient: bool = True,
) -> RankLoss:
    """`smooth_rank_loss` in float32 or float64, outside autocast.

    Args:
        embeddings: Usually of unit length; similarities are inner products. Half precision is computed in float32,
            and autocast does not apply: similarities in 16 bits would be off by several `rank_temperature`.
        labels: Class of each row, in any order; any number of rows per class.
        loss_of_ranks: What to make of the ranks.
        rank_temperature: τ of the ranks, in units of similarity; above 0.
        ranks_query_itself: Whether a query takes part in its own ranked list.
        mixing: None, or one coefficient a per row (i, j) of `mixing_pairs(labels)`, in [0, 1], or those of some pairs:
            virtual samples a * embeddings[i] + (1 - a) * embeddings[j], not normalised again, join the batch in every
            role. The coefficients are treated as constants.
        query_share: (worker, number of workers): only that worker's part of the queries, and still a gradient by
            every embedding. Losses and gradients of all workers add up to those of the batch.
        with_gradient: False saves the time for it.

    Raises:
        ValueError: an argument is outside what is said above.
    """
    check_batch(embeddings, labels, query_share=query_share)
    check_above_zero("rank_temperature", rank_temperature)
    dtype = precision_of(embeddings)
    mixture = None
    if mixing is not None:
        pairs = mixing.pairs if isinstance(mixing, PairMixing) else mixing_pairs(labels)
        coefficients = mixing.coefficients if isinstance(mixing, PairMixing) else mixing
        _check_mixing(coefficients, num_pairs=len(pairs))
        mixture = mix(pairs, coefficients.to(dtype), num_images=len(labels))
        labels = labels[mixture.parents[:, 0]]
    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
        return smooth_rank_loss(
            embeddings.to(dtype),
            labels,
            loss_of_ranks,
            rank_temperature=rank_temperature,
            ranks_query_itself=ranks_query_itself,
            mixture=mixture,
            query_share=query_share,
            with_gradient=with_gradient,
        )


def _check_mixing(mixing: Tensor, *, num_pairs: int) -> None:
    if mixing.shape != (num_pairs,):
        raise ValueError(
            f"mixing must hold one coefficient for each of the {num_pairs} pairs of mixing_pairs(labels), "
            f"got shape {tuple(mixing.shape)}"
        )
    # Negated, so that NaN is refused too.
    if not bool(((mixing >= 0) & (mixing <= 1)).all()):
        raise ValueError("mixing coefficients must lie in [0, 1]")
