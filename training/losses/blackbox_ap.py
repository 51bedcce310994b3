"""Average precision of hard ranks, with the gradient that ranking again gives.

    L(q) = 1 - mean over positives x of r₊(q, x) / r(q, x)

with r the place of x in the ranking of all images but the query, r₊ that among the positives. Ranks are steps, whose
derivative is 0. In its place stands how the ranking changes when the similarities are pushed against the loss:

    dL/ds = (rank(s + λ dL/dr) - rank(s)) / λ,    dL/dr(q, x) = r₊ / (r² |P(q)| n) for a positive, else 0

with L the mean over the n queries of the batch, as in the paper's released code: λ is worth as much in a batch twice as
large when it is twice as large. So a positive is pulled up by the images that it overtakes once λ dL/dr is added to
it, and each of these is pushed down by one. The ranks r₊ count as constants. A margin is put between positives and
negatives first, α/2 either way.

Differs from the paper's released code, where half the margin of each image is scaled by a normal random number.

Source: Rolinek, Musil, Paulus, Vlastelica, Michaelis, Martius, "Optimizing Rank-based Metrics with Blackbox
Differentiation", CVPR 2020, arXiv:1912.03500, algorithm 1, eq. 7 to 10.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training.losses.batch_arguments import check_above_zero, check_batch, precision_of
from training.losses.class_rows import group_by_class
from training.losses.known_gradient import with_known_gradient
from training.losses.query_plan import queries_of_share
from training.losses.rank_statistics import RankStatistics, rank_histogram
from training.losses.similarities import ImageSimilarities
from training.losses.smooth_ranks import RankLoss

# Similarities held at a time.
_BLOCK_ENTRIES = 1 << 20


def blackbox_average_precision(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    interpolation: float = 4.0,
    margin: float = 0.02,
    query_share: tuple[int, int] = (0, 1),
) -> Float[Tensor, ""]:
    """The loss of `blackbox_average_precision_with_gradient`, to call `backward()` on: see `with_known_gradient`."""
    return with_known_gradient(
        lambda rows, with_gradient: blackbox_average_precision_with_gradient(
            rows,
            labels,
            interpolation=interpolation,
            margin=margin,
            query_share=query_share,
            with_gradient=with_gradient,
        ),
        embeddings,
    )


def blackbox_average_precision_with_gradient(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    *,
    interpolation: float = 4.0,
    margin: float = 0.02,
    query_share: tuple[int, int] = (0, 1),
    with_gradient: bool = True,
) -> RankLoss:
    """Mean over the queries that have positives, and the gradient by every embedding, without autograd.

    At a perfect ranking, beyond the margin, the loss is 0. Of images at the same similarity, negatives come before
    positives, and positives in order of rows.

    Args:
        embeddings: Usually of unit length. Half precision is computed in float32, and autocast does not apply.
        labels: Class of each row, in any order; any number of rows per class.
        interpolation: λ, above 0: how far similarities are pushed. Small ones give the gradient of few images. The
            default is that of batches of 128 or so.
        margin: α, in units of similarity, 0 or more.
        query_share: (worker, number of workers): only that worker's part of the queries, and still a gradient by
            every embedding. Losses and gradients of all workers add up to those of the batch.
        with_gradient: False saves the time for it.

    Returns:
        In float64 for float64, else in float32. `statistics` knows no window.

    Raises:
        ValueError: an argument is outside what is said above.
    """
    check_batch(embeddings, labels, query_share=query_share)
    check_above_zero("interpolation", interpolation)
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin must be finite and 0 or more, got {margin}")
    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
        return _loss(embeddings.to(precision_of(embeddings)), labels, interpolation, margin, query_share, with_gradient)


def _loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    interpolation: float,
    margin: float,
    query_share: tuple[int, int],
    with_gradient: bool,
) -> RankLoss:
    samples = ImageSimilarities(embeddings)
    classes = group_by_class(labels)
    num_ranked, share = queries_of_share(classes, query_share)
    gallery = samples.block(torch.arange(len(labels), device=labels.device))
    loss = torch.zeros((), dtype=torch.float64, device=embeddings.device)
    num_live, all_ranks = 0, []
    for queries in share.split(max(1, _BLOCK_ENTRIES // len(labels))) if len(share) else ():
        block = samples.block(queries)
        positives, is_positive = classes.others(queries)
        negatives = samples.between(block, gallery)
        scores = torch.where(is_positive, negatives.gather(1, positives) - margin, -math.inf)
        # Neither the query nor a positive is among the negatives; padding names a positive once more.
        negatives.scatter_(1, queries[:, None], -math.inf).scatter_(1, positives, -math.inf)
        above, among_positives = _num_at_least(negatives, scores), _ranks_among(scores)
        ranks = above + among_positives
        shares = is_positive.to(scores.dtype) / is_positive.sum(1, keepdim=True)
        loss += (1 - (shares * among_positives / ranks).sum(1)).sum(dtype=torch.float64)
        all_ranks.append(ranks[is_positive])
        if with_gradient:
            raised = scores + interpolation / num_ranked * shares * among_positives / ranks.square()
            changes = _changes(negatives, scores, raised)
            moved = torch.where(is_positive, _num_at_least(negatives, raised) + _ranks_among(raised) - ranks, 0)
            num_live += int(moved.any(1).count_nonzero())
            changes.scatter_add_(1, positives, moved)
            samples.add_gradient(block, gallery, changes.div_(interpolation))
    return RankLoss(
        loss=(loss / max(num_ranked, 1)).to(embeddings.dtype),
        gradient=samples.gradient() if with_gradient else None,
        statistics=RankStatistics(
            num_queries=len(share),
            num_live_queries=num_live,
            num_comparisons=0,
            num_in_window=0.0,
            rank_histogram=rank_histogram(all_ranks, num_samples=len(labels)),
        ),
    )


def _num_at_least(
    negatives: Float[Tensor, "queries gallery"], scores: Float[Tensor, "queries positives"]
) -> Float[Tensor, "queries positives"]:
    """How many negatives come before each positive."""
    is_above = torch.empty_like(negatives)  # as numbers: comparing to booleans is several times slower
    counts = torch.empty_like(scores)
    for index in range(scores.shape[1]):
        counts[:, index] = torch.ge(negatives, scores[:, index, None], out=is_above).sum(1)
    return counts


def _ranks_among(scores: Float[Tensor, "queries positives"]) -> Float[Tensor, "queries positives"]:
    """From 1 for the highest; of equal ones, the first comes first."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    return torch.empty_like(scores).scatter_(1, order, places.expand_as(scores))


def _changes(
    negatives: Float[Tensor, "queries gallery"],
    scores: Float[Tensor, "queries positives"],
    raised: Float[Tensor, "queries positives"],
) -> Float[Tensor, "queries gallery"]:
    """By how many positives each negative is overtaken."""
    changes = torch.zeros_like(negatives)
    compared = torch.empty_like(negatives)
    for index in range(scores.shape[1]):
        changes += torch.ge(negatives, scores[:, index, None], out=compared)
        changes -= torch.ge(negatives, raised[:, index, None], out=compared)
    return changes
