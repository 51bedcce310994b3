"""Losses that are functions of smooth ranks: exact, fused, in memory that grows with the batch, not with its square.

The rank of a positive x of a query q is a sum over the gallery of soft comparisons with a threshold, s(q, x):

    r(q, x) = 1 + Σ_{z ≠ x} σ((s(q, z) - s(q, x)) / τ)

so one row of similarities serves all positives of its query. Queries are worked on in blocks. Once the ranks of a
block are known, so is the slope of the loss in each of them, and the block's gradient is formed while its
similarities are at hand: they are computed once, and nothing is kept for a backward pass.

σ is flat, so most of the work can be left out without a trace in the result:
  * a positive that ranks far below where the loss still cares has no slope, and a query with only such positives
    has no gradient;
  * an image far below the lowest threshold that has a slope does not touch the gradient. Once an encoder has
    learned something that is nearly every image, and the gradient is a short list of (query, image) pairs. Before,
    the list would be long and the block is treated as a dense matrix.
"Far" is where everything left out together stays below the round-off of what is kept (`_saturation`), so float64
leaves out less than float32.

Source: Patel, Tolias, Matas, CVPR 2022, arXiv:2108.11179, eq. 5 and 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.losses.class_rows import ClassRows, group_by_class
from training.losses.mixing import Mixture
from training.losses.similarities import MAX_SPARSE_SHARE, ImageSimilarities, MixedSimilarities, Similarities

# Similarities held at a time. 4 MB of float32 stay in a CPU's caches; an accelerator wants more work per launch.
_BLOCK_ENTRIES_CPU = 1 << 20
_BLOCK_ENTRIES_ACCELERATOR = 1 << 25
_MIN_BLOCK_QUERIES = 32


# (ranks [queries, positives], is_positive, the same shape) -> (a loss of each query [queries], its derivative by each
# rank [queries, positives]: 0 where is_positive is not set, and the rank there has no meaning).
LossOfRanks = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class RankLoss:
    """A loss and its gradient, or one worker's share of both."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "batch dim"] | None  # by every embedding of the batch; None where not asked for
    live_fraction: float  # of the queries, those with a gradient: near 0 the batch teaches nothing


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries against the whole gallery. Queries with more positives come first."""

    queries: Int[Tensor, "queries"]
    similarities: Float[Tensor, "queries gallery"]
    positives: Int[Tensor, "queries positives"]  # in the gallery
    is_positive: Bool[Tensor, "queries positives"]
    thresholds: Float[Tensor, "queries positives"]  # similarities of the positives; some of them again as padding

    def select(self, rows: Int[Tensor, "chosen"]) -> "_Block":
        if len(rows) == len(self.queries):
            return self
        return _Block(
            queries=self.queries[rows],
            similarities=self.similarities[rows],
            positives=self.positives[rows],
            is_positive=self.is_positive[rows],
            thresholds=self.thresholds[rows],
        )


@dataclass(frozen=True, slots=True)
class _Sigmoid:
    """The σ of a batch."""

    temperature: float
    saturation: float  # how many temperatures from 0 it is flat, see `_saturation`


class _SoftComparisons:
    """σ((s(q, z) - t) / τ) of a block, for one threshold t of each query after another.

    One exponential serves all thresholds: with h the highest of a row, e = exp((h - s) / τ) and b = exp((h - t) / τ),
    the comparison is b / (b + e). Since b is at least 1, e may overflow to infinity and only make it 0.
    """

    def __init__(self, block: _Block, sigmoid: _Sigmoid) -> None:
        self._block = block
        self._temperature = sigmoid.temperature
        self._result = torch.empty_like(block.similarities)
        # As many of a block's first queries have a first positive, a second and so on.
        self.num_queries: list[int] = block.is_positive.sum(0).tolist()
        highest = block.thresholds.amax(1, keepdim=True)
        scale = 1 / (self._temperature * math.log(2))  # exp2 is more than twice as fast as exp
        largest_exponent = math.log(torch.finfo(block.similarities.dtype).max)
        spread = float((highest - block.thresholds).max()) / self._temperature
        # Beyond, an e that overflows could still matter to the lowest threshold.
        self._is_shared = spread + sigmoid.saturation <= largest_exponent
        if self._is_shared:
            self._exponentials = torch.sub(highest, block.similarities).mul_(scale).exp2_()
            self._offsets = torch.sub(highest, block.thresholds).mul_(scale).exp2_()

    def with_positive(self, index: int) -> Float[Tensor, "queries gallery"]:
        """Of the first `num_queries[index]` queries; overwritten by the next call."""
        count = self.num_queries[index]
        result = self._result[:count]
        if self._is_shared:
            offsets = self._offsets[:count, index, None]
            return torch.add(self._exponentials[:count], offsets, out=result).reciprocal_().mul_(offsets)
        thresholds = self._block.thresholds[:count, index, None]
        return torch.sub(self._block.similarities[:count], thresholds, out=result).div_(self._temperature).sigmoid_()


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
        with_gradient: Costs up to three times the loss before training, a fraction of it after.

    Returns:
        In the dtype of `embeddings`. Without a single positive, loss and gradient are 0.

    Memory above the arguments: one or two gradients and about six blocks of 4 MB. On CPU the result is the same to
    the bit for the same number of threads.
    """
    samples = ImageSimilarities(embeddings) if mixture is None else MixedSimilarities(embeddings, mixture)
    classes = group_by_class(labels)
    num_ranked, queries = _queries_of_share(classes, query_share)
    block_size = _queries_per_block(embeddings.device, len(labels))
    sigmoid = _Sigmoid(rank_temperature, _saturation(embeddings.dtype, len(labels)))

    loss = torch.zeros((), dtype=torch.float64, device=embeddings.device)
    steepest = embeddings.new_zeros(())
    num_live = 0
    for start in range(0, len(queries), block_size):
        block_queries = queries[start : start + block_size]
        block = _block(samples, classes, block_queries, ranks_query_itself=ranks_query_itself)
        ranks = _ranks(block, sigmoid)
        losses, slopes = loss_of_ranks(ranks, block.is_positive)
        loss += losses.sum(dtype=torch.float64)
        if not with_gradient:
            continue
        # What is negligible is measured against the steepest slope seen: a batch of small slopes keeps its gradient.
        steepest = torch.maximum(steepest, slopes.abs().amax())
        slopes = torch.where(slopes.abs() <= steepest * math.exp(-sigmoid.saturation), 0, slopes)
        live = slopes.any(1).nonzero().squeeze(1)
        num_live += len(live)
        if len(live):
            _add_gradient(samples, block.select(live), slopes[live] / num_ranked, sigmoid)
    return RankLoss(
        loss=(loss / max(num_ranked, 1)).to(embeddings.dtype),
        gradient=samples.gradient() if with_gradient else None,
        live_fraction=num_live / max(len(queries), 1),
    )


def _saturation(dtype: torch.dtype, num_samples: int) -> float:
    """How many temperatures away from its threshold σ is flat: there, all samples together are below the round-off."""
    return math.log(num_samples / torch.finfo(dtype).eps)


def _queries_per_block(device: torch.device, num_samples: int) -> int:
    entries = _BLOCK_ENTRIES_CPU if device.type == "cpu" else _BLOCK_ENTRIES_ACCELERATOR
    return max(_MIN_BLOCK_QUERIES, entries // num_samples)


def _queries_of_share(classes: ClassRows, query_share: tuple[int, int]) -> tuple[int, Int[Tensor, "queries"]]:
    """How many queries have positives, and those of one worker, those with more positives first."""
    worker, num_workers = query_share
    ranked = classes.order[classes.sizes[classes.order] > 1]
    # By class, because mixed queries of one class are made of the same images.
    share = ranked[len(ranked) * worker // num_workers : len(ranked) * (worker + 1) // num_workers]
    return len(ranked), share[torch.argsort(classes.sizes[share], descending=True, stable=True)]


def _block(
    samples: Similarities, classes: ClassRows, queries: Int[Tensor, "queries"], *, ranks_query_itself: bool
) -> _Block:
    similarities = samples.rows(queries)
    if not ranks_query_itself:
        similarities.scatter_(1, queries[:, None], -math.inf)
    positives, is_positive = classes.others(queries)
    thresholds = similarities.gather(1, positives)
    return _Block(
        queries, similarities, positives, is_positive, torch.where(is_positive, thresholds, thresholds[:, :1])
    )


def _ranks(block: _Block, sigmoid: _Sigmoid) -> Float[Tensor, "queries positives"]:
    comparisons = _SoftComparisons(block, sigmoid)
    ranks = torch.zeros_like(block.thresholds)
    for index, count in enumerate(comparisons.num_queries):
        # Each positive met itself in the sum, at σ(0) = 1/2 where the rank has 1.
        ranks[:count, index] = comparisons.with_positive(index).sum(1) + 0.5
    return ranks


def _add_gradient(
    samples: Similarities,
    block: _Block,
    slopes: Float[Tensor, "queries positives"],
    sigmoid: _Sigmoid,
) -> None:
    """Hands `samples` the gradient that `slopes`, those of the loss by each rank, cause in the block's similarities.

    A rank rises with s(q, z) as fast as σ does, σ' = σ (1 - σ), and falls with its threshold as fast as all together;
    z = x cancels, as it should.
    """
    lowest = torch.where(slopes != 0, block.thresholds, math.inf).amin(1, keepdim=True)
    is_near = block.similarities > lowest - sigmoid.saturation * sigmoid.temperature
    if int(is_near.count_nonzero()) > MAX_SPARSE_SHARE * is_near.numel():
        _add_dense_gradient(samples, block, slopes, sigmoid)
    else:
        _add_sparse_gradient(samples, block, slopes, is_near, temperature=sigmoid.temperature)


def _add_dense_gradient(
    samples: Similarities,
    block: _Block,
    slopes: Float[Tensor, "queries positives"],
    sigmoid: _Sigmoid,
) -> None:
    comparisons = _SoftComparisons(block, sigmoid)
    pull = torch.zeros_like(block.similarities)
    pulls = torch.zeros_like(slopes)
    for index, count in enumerate(comparisons.num_queries):
        steepness = comparisons.with_positive(index)
        steepness.addcmul_(steepness, steepness, value=-1)
        pull[:count].addcmul_(steepness, slopes[:count, index, None])
        pulls[:count, index] = steepness.sum(1)
    pull.scatter_add_(1, block.positives, -slopes * pulls)
    samples.add_gradient(block.queries, pull.div_(sigmoid.temperature))


def _add_sparse_gradient(
    samples: Similarities,
    block: _Block,
    slopes: Float[Tensor, "queries positives"],
    is_near: Bool[Tensor, "queries gallery"],
    *,
    temperature: float,
) -> None:
    rows, columns = is_near.nonzero(as_tuple=True)
    similarities = block.similarities[rows, columns]
    pull = torch.zeros_like(similarities)
    pulls = torch.zeros_like(slopes.T)  # [positives, queries], so that one positive's are contiguous
    for index, (thresholds, slope) in enumerate(
        zip(block.thresholds.T.contiguous(), slopes.T.contiguous(), strict=True)
    ):
        steepness = (similarities - thresholds[rows]).div_(temperature).sigmoid_()
        steepness.addcmul_(steepness, steepness, value=-1)
        pull.addcmul_(steepness, slope[rows])
        pulls[index].index_add_(0, rows, steepness)
    positive_rows = torch.arange(len(slopes), device=rows.device)[:, None].expand_as(slopes)
    samples.add_sparse_gradient(
        block.queries,
        torch.cat([rows, positive_rows.flatten()]),
        torch.cat([columns, block.positives.flatten()]),
        torch.cat([pull, (-slopes * pulls.T).flatten()]).div_(temperature),
    )
