"""One loss over the embeddings of all processes: each scores its own query rows against all columns."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from lookalike.collectives import all_gather_rows, reduce_scatter_rows, sum_over_ranks
from lookalike.world import World
from training.losses.batch_loss import BatchLoss, LossShare


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The loss of the global batch, and what it was computed from."""

    loss: Float[Tensor, ""]  # of all processes
    gradient: Float[Tensor, "rows dim"]  # of that loss, by this process's embeddings
    embeddings: Float[Tensor, "batch dim"]  # of all processes
    labels: Int64[Tensor, "batch"]
    share: LossShare  # what this process contributed


def score_across_ranks(
    embeddings: Float[Tensor, "rows dim"],
    labels: Int64[Tensor, "rows"],
    loss: BatchLoss,
    *,
    step: int,
    world: World,
) -> ScoredBatch:
    """The loss of all ranks' embeddings and its gradient with respect to this rank's.

    One all-gather of embeddings, one reduce-scatter of gradients. The parts of the loss are summed, not averaged, so
    gradients of parameters, those of the loss included, must be summed over ranks, too; no other place holds a factor.
    """
    everyone = all_gather_rows(embeddings.detach(), world)
    everyones_labels = all_gather_rows(labels, world)
    share = loss(everyone, everyones_labels, share=(world.rank, world.size), step=step)
    total = share.loss.clone()
    sum_over_ranks([total], world)
    return ScoredBatch(total, reduce_scatter_rows(share.gradient, world), everyone, everyones_labels, share)
