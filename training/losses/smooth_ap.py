"""Smooth average precision: ranks made smooth in the formula of average precision, and 1 minus it as a loss.

    L(q) = 1 - mean over positives x of r₊(q, x) / r(q, x)

with r the smooth rank of x among all images but the query, r₊ that among the other positives alone. At a perfect
ranking without ties r₊ = r, and the loss is 0.

Source: Brown, Xie, Kalogeiton, Zisserman, "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
ECCV 2020, arXiv:2007.12163, eq. 5 and 6.
"""

from jaxtyping import Float, Int
from torch import Tensor

from training.losses.batch_rank_loss import batch_rank_loss
from training.losses.known_gradient import with_known_gradient
from training.losses.mixing import Mixing
from training.losses.smooth_ranks import LossAtRanks, RankLoss, Ranks


def smooth_average_precision(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    rank_temperature: float = 0.01,
    mixing: Mixing | None = None,
    query_share: tuple[int, int] = (0, 1),
) -> Float[Tensor, ""]:
    """The loss of `smooth_average_precision_with_gradient`, to call `backward()` on: see `with_known_gradient`."""
    return with_known_gradient(
        lambda rows, with_gradient: smooth_average_precision_with_gradient(
            rows,
            labels,
            rank_temperature=rank_temperature,
            mixing=mixing,
            query_share=query_share,
            with_gradient=with_gradient,
        ),
        embeddings,
    )


def smooth_average_precision_with_gradient(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    rank_temperature: float = 0.01,
    mixing: Mixing | None = None,
    query_share: tuple[int, int] = (0, 1),
    with_gradient: bool = True,
) -> RankLoss:
    """Mean smooth AP loss over the queries that have positives, and its gradient by every embedding, without autograd.

    Arguments and errors are those of `batch_rank_loss`. No positive is so far down that it has no slope, as the recall
    surrogate has it, so before training the gradient costs more than that of recall.
    """
    return batch_rank_loss(
        embeddings,
        labels,
        _average_precision,
        rank_temperature=rank_temperature,
        mixing=mixing,
        query_share=query_share,
        with_gradient=with_gradient,
    )


def _average_precision(at: Ranks) -> LossAtRanks:
    share = at.is_positive.to(at.among_all.dtype) / at.is_positive.sum(1, keepdim=True)
    among_positives = at.among_positives()
    precisions = among_positives / at.among_all
    return LossAtRanks(
        losses=1 - (share * precisions).sum(1),
        slopes=share * precisions / at.among_all,
        slopes_among_positives=-share / at.among_all,
    )
