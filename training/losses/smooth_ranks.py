"""Losses that are functions of smooth ranks: exact, fused, in memory that grows with the batch, not with its square.

The rank of a positive x of a query q is a sum over the gallery of soft comparisons with a threshold, s(q, x):

    r(q, x) = 1 + Σ_{z ≠ x} σ((s(q, z) - s(q, x)) / τ)

The thresholds come first: they are few. Then one similarity serves all positives of its query, and all of its gallery
image where that is a query too, because s(q, z) = s(z, q): only half of the similarities are computed. They come in
square tiles that stay in a CPU's caches, and no tile is kept.

σ is flat, so most of the work can be left out without a trace in the result. An image far below the lowest threshold
of a query adds nothing to its ranks or to its gradient; once an encoder has learned something, that is nearly every
image. Three ways follow, from fast to slow:
  1. the near pairs of the batch are few: they are listed, and ranks and gradient follow from the list;
  2. they are many, but a positive that ranks far below where the loss still cares has no slope, and a query with only
     such positives has no gradient. Seen from the positives with a slope the near pairs are few: the ranks come from
     tiles, the gradient from a list;
  3. ranks and gradient both come from tiles, the second time only those of queries that have a gradient.
"Far" is where everything left out together stays below the round-off of what is kept (`saturation_of`), so float64
leaves out less than float32.

Source: Patel, Tolias, Matas, CVPR 2022, arXiv:2108.11179, eq. 5 and 6.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.losses.class_rows import group_by_class
from training.losses.mixing import Mixture
from training.losses.query_plan import (
    NearPairs,
    OfBlocks,
    Plan,
    Queries,
    floor_of,
    near_pairs,
    of_live_queries,
    plan_tiles,
    queries_of_share,
)
from training.losses.rank_statistics import RankStatistics, rank_histogram
from training.losses.similarities import ImageSimilarities, MixedSimilarities, Similarities
from training.losses.soft_comparisons import Sigmoid, Workspace, saturation_of, soft_comparisons

# Numbers held at a time where positives are compared with one another.
_COMPARISONS = 1 << 18


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where the positives of some queries rank. Entries that are not `is_positive` have no meaning."""

    among_all: Float[Tensor, "queries positives"]
    is_positive: Bool[Tensor, "queries positives"]
    thresholds: Float[Tensor, "queries positives"]  # their similarities to the query
    temperature: float  # τ

    def among_positives(self) -> Float[Tensor, "queries positives"]:
        """The same in a gallery of the query's positives alone."""
        rows = [1 + _comparisons_of_positives(self, part).sum(2) for part in _row_parts(self.is_positive)]
        return torch.cat(rows) if rows else torch.ones_like(self.thresholds)


@dataclass(frozen=True, slots=True)
class LossAtRanks:
    """A loss of each query and its derivatives by each rank, 0 where an entry is not a positive."""

    losses: Float[Tensor, "queries"]
    slopes: Float[Tensor, "queries positives"]  # by `Ranks.among_all`
    slopes_among_positives: Float[Tensor, "queries positives"] | None = None  # None: it does not use those ranks


LossOfRanks = Callable[[Ranks], LossAtRanks]


@dataclass(frozen=True, slots=True)
class RankLoss:
    """A loss and its gradient, or one worker's share of both."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "batch dim"] | None  # by every embedding of the batch; None where not asked for
    statistics: RankStatistics

    @property
    def live_fraction(self) -> float:
        """Of the queries, those with a gradient: near 0 the batch teaches nothing."""
        return self.statistics.live_fraction


def smooth_rank_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "samples"],
    loss_of_ranks: LossOfRanks,
    *,
    rank_temperature: float,
    ranks_query_itself: bool,
    mixture: Mixture | None = None,
    query_share: tuple[int, int] = (0, 1),
    with_gradient: bool = True,
) -> RankLoss:
    """Mean of `loss_of_ranks` over all queries that have positives, and its gradient.

    Every sample is a query; its positives are the other samples of its class; every sample is in the gallery.

    Args:
        embeddings: float32 or float64. Similarities are inner products, so rows are usually of unit length.
        labels: Class of each sample, that is of each embedding, or of each sample of `mixture`.
        loss_of_ranks: What to make of the ranks.
        rank_temperature: τ, in units of similarity; above 0.
        ranks_query_itself: Whether a query takes part in its own ranked list.
        mixture: Samples to use in place of the embeddings.
        query_share: (worker, number of workers): that worker's part of the queries only. The losses and the
            gradients of all workers add up to those of the whole.
        with_gradient: Costs up to four times the loss before training, a fraction of it after.

    Returns:
        In the dtype of `embeddings`. Without a single positive, loss and gradient are 0.

    Memory above the arguments: one or two gradients, a list that is no larger than those, and about six tiles of 1 MB.
    On CPU the result is the same to the bit for the same number of threads.
    """
    samples = ImageSimilarities(embeddings) if mixture is None else MixedSimilarities(embeddings, mixture)
    classes = group_by_class(labels)
    num_ranked, share = queries_of_share(classes, query_share)
    sigmoid = Sigmoid(rank_temperature, saturation_of(embeddings.dtype, len(labels)))
    plan = plan_tiles(samples, classes, share, ranks_query_itself=ranks_query_itself)

    floors = [floor_of(queries, queries.is_positive, sigmoid) for queries in plan.queries]
    near = near_pairs(samples, plan, floors)
    if near is None:
        ranks = _ranks_from_tiles(samples, plan, sigmoid)
    else:
        ranks = [_ranks_from_list(*one, sigmoid) for one in zip(plan.queries, near, strict=True)]
    all_ranks = [
        Ranks(among_all, queries.is_positive, queries.thresholds, rank_temperature)
        for queries, among_all in zip(plan.queries, ranks, strict=True)
    ]
    at_ranks = [loss_of_ranks(one) for one in all_ranks]
    loss = torch.zeros((), dtype=torch.float64, device=embeddings.device)
    for part in at_ranks:
        loss += part.losses.sum(dtype=torch.float64)
    num_live, num_comparisons, num_in_window = 0, 0, 0.0
    if with_gradient and plan.queries:
        slopes = _without_negligible([part.slopes for part in at_ranks], sigmoid)
        num_live = sum(int(part.any(1).count_nonzero()) for part in slopes)
        num_comparisons = sum(int(part.count_nonzero()) for part in slopes) * len(labels)
        slopes = [part / num_ranked for part in slopes]
        for queries, one, part in zip(plan.queries, all_ranks, at_ranks, strict=True):
            if part.slopes_among_positives is not None:
                _add_gradient_among_positives(samples, queries, one, part.slopes_among_positives / num_ranked)
        if num_live:
            num_in_window = 4 * _add_gradient(samples, plan, slopes, near, sigmoid)
    return RankLoss(
        loss=(loss / max(num_ranked, 1)).to(embeddings.dtype),
        gradient=samples.gradient() if with_gradient else None,
        statistics=RankStatistics(
            num_queries=len(share),
            num_live_queries=num_live,
            num_comparisons=num_comparisons,
            num_in_window=num_in_window,
            rank_histogram=rank_histogram(
                (one.among_all[one.is_positive] for one in all_ranks),
                num_samples=len(labels),
            ),
        ),
    )


def _without_negligible(slopes: OfBlocks, sigmoid: Sigmoid) -> OfBlocks:
    # Measured against the steepest: a batch of small slopes keeps its gradient.
    steepest = torch.stack([part.abs().amax() for part in slopes]).amax()
    return [torch.where(part.abs() <= steepest * math.exp(-sigmoid.saturation), 0, part) for part in slopes]


def _ranks_from_list(queries: Queries, near: NearPairs, sigmoid: Sigmoid) -> Float[Tensor, "queries positives"]:
    ranks = torch.zeros_like(queries.thresholds.T)  # so that those of one place are contiguous
    for one, thresholds in zip(ranks, queries.thresholds.T.contiguous(), strict=True):
        comparisons = (near.similarities - thresholds[near.rows]).div_(sigmoid.temperature).sigmoid_()
        one.index_add_(0, near.rows, comparisons)
    # Each positive met itself in the sum, at σ(0) = 1/2 where the rank has 1.
    return ranks.T + 0.5


def _ranks_from_tiles(samples: Similarities, plan: Plan, sigmoid: Sigmoid) -> OfBlocks:
    comparisons = [
        soft_comparisons(queries.thresholds, sigmoid, is_served=queries.is_positive) for queries in plan.queries
    ]
    ranks = [torch.full_like(queries.thresholds, 0.5) for queries in plan.queries]
    workspace = Workspace(2)
    for row, column, serves_both, similarities in plan.tiles(samples):
        buffers = workspace.like(similarities)
        comparisons[row].add_sums(ranks[row], similarities, buffers)
        if serves_both:
            comparisons[column].add_sums(ranks[column], similarities.T, [buffer.T for buffer in buffers])
    return ranks


def _add_gradient(
    samples: Similarities,
    plan: Plan,
    slopes: OfBlocks,
    near: list[NearPairs] | None,
    sigmoid: Sigmoid,
) -> float:
    """Hands `samples` the gradient that `slopes`, those of the loss by each rank, cause in the similarities.

    A rank rises with s(q, z) as fast as σ does, σ' = σ (1 - σ), and falls with its threshold as fast as all together;
    z = x cancels, as it should.

    Returns the sum of σ' over all comparisons with positives that have a slope.
    """
    if near is None:
        plan, slopes = of_live_queries(samples, plan, slopes)
        live_floors = [
            floor_of(queries, part != 0, sigmoid) for queries, part in zip(plan.queries, slopes, strict=True)
        ]
        near = near_pairs(samples, plan, live_floors)
    if near is None:
        return _add_gradient_from_tiles(samples, plan, slopes, sigmoid)
    return sum(_add_gradient_from_list(samples, *one, sigmoid) for one in zip(plan.queries, slopes, near, strict=True))


def _add_gradient_from_tiles(samples: Similarities, plan: Plan, slopes: OfBlocks, sigmoid: Sigmoid) -> float:
    comparisons = [
        soft_comparisons(queries.thresholds, sigmoid, is_served=part != 0)
        for queries, part in zip(plan.queries, slopes, strict=True)
    ]
    pulls = [torch.zeros_like(part) for part in slopes]
    workspace = Workspace(3)
    for row, column, serves_both, similarities in plan.tiles(samples):
        pull, *buffers = workspace.like(similarities)
        pull.zero_()
        comparisons[row].add_pull(pull, pulls[row], slopes[row], similarities, buffers)
        if serves_both:
            turned = [buffer.T for buffer in buffers]
            comparisons[column].add_pull(pull.T, pulls[column], slopes[column], similarities.T, turned)
        samples.add_gradient(plan.queries[row].block, plan.gallery[column], pull.div_(sigmoid.temperature))
    for queries, part, pull in zip(plan.queries, slopes, pulls, strict=True):
        _add_gradient_by_thresholds(samples, queries, (part * pull).div_(-sigmoid.temperature))
    return float(sum((pull * (part != 0)).sum() for part, pull in zip(slopes, pulls, strict=True)))


def _add_gradient_by_thresholds(
    samples: Similarities, queries: Queries, slopes: Float[Tensor, "queries positives"]
) -> None:
    rows = torch.arange(len(queries), device=slopes.device)[:, None].expand_as(slopes)
    samples.add_sparse_gradient(queries.block.samples, rows.flatten(), queries.positives.flatten(), slopes.flatten())


def _add_gradient_from_list(
    samples: Similarities,
    queries: Queries,
    slopes: Float[Tensor, "queries positives"],
    near: NearPairs,
    sigmoid: Sigmoid,
) -> float:
    rows = near.rows
    pull = torch.zeros_like(near.similarities)
    pulls = torch.zeros_like(slopes.T)  # [positives, queries], so that those of one place are contiguous
    for index, (thresholds, slope) in enumerate(
        zip(queries.thresholds.T.contiguous(), slopes.T.contiguous(), strict=True)
    ):
        steepness = (near.similarities - thresholds[rows]).div_(sigmoid.temperature).sigmoid_()
        steepness.addcmul_(steepness, steepness, value=-1)
        pull.addcmul_(steepness, slope[rows])
        pulls[index].index_add_(0, rows, steepness)
    positive_rows = torch.arange(len(slopes), device=rows.device)[:, None].expand_as(slopes)
    samples.add_sparse_gradient(
        queries.block.samples,
        torch.cat([rows, positive_rows.flatten()]),
        torch.cat([near.samples, queries.positives.flatten()]),
        torch.cat([pull, (-slopes * pulls.T).flatten()]).div_(sigmoid.temperature),
    )
    return float((pulls.T * (slopes != 0)).sum())


def _row_parts(is_positive: Bool[Tensor, "queries positives"]) -> Iterator[slice]:
    """Few enough queries at a time to compare all their positives with one another."""
    num_queries, num_positives = is_positive.shape
    size = max(1, _COMPARISONS // max(num_positives, 1) ** 2)
    yield from (slice(start, start + size) for start in range(0, num_queries, size))


def _comparisons_of_positives(ranks: Ranks, part: slice) -> Float[Tensor, "queries positives positives"]:
    """σ((s(q, y) - s(q, x)) / τ) at [q, x, y]; 0 for y = x, and where either is no positive."""
    thresholds, is_positive = ranks.thresholds[part], ranks.is_positive[part]
    comparisons = (thresholds[:, None, :] - thresholds[:, :, None]).div_(ranks.temperature).sigmoid_()
    comparisons *= is_positive[:, :, None] & is_positive[:, None, :]
    comparisons.diagonal(dim1=1, dim2=2).zero_()
    return comparisons


def _add_gradient_among_positives(samples: Similarities, queries: Queries, ranks: Ranks, slopes: Tensor) -> None:
    """The same for slopes of the loss by the ranks among positives: only thresholds are compared."""
    by_thresholds = torch.zeros_like(slopes)
    for part in _row_parts(ranks.is_positive):
        steepness = _comparisons_of_positives(ranks, part)
        steepness.addcmul_(steepness, steepness, value=-1)
        pull = steepness.mul_(slopes[part, :, None])
        by_thresholds[part] = pull.sum(1) - pull.sum(2)
    _add_gradient_by_thresholds(samples, queries, by_thresholds.div_(ranks.temperature))
