"""One loss over the embeddings of all processes: each scores its own query rows against all columns."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lookalike.collectives import all_gather_rows, reduce_scatter_rows, sum_over_ranks
from lookalike.world import World

# (all embeddings, all labels, this process's share of the queries) -> this share's part of the mean loss.
ShareOfLoss = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def score_across_ranks(
    embeddings: Float[Tensor, "rows dim"],
    labels: Int64[Tensor, "rows"],
    share_of_loss: ShareOfLoss,
    *,
    world: World,
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows dim"]]:
    """The mean loss over all queries of all ranks and its gradient with respect to this rank's embeddings.

    One all-gather of embeddings, one reduce-scatter of gradients. The parts of the loss are summed, not averaged, so
    parameter gradients of the ranks must be summed, too; no other place holds a factor.
    """
    everyone = all_gather_rows(embeddings.detach(), world).requires_grad_(True)
    everyones_labels = all_gather_rows(labels, world)
    with torch.enable_grad():
        part = share_of_loss(everyone, everyones_labels, (world.rank, world.size))
        (gradient,) = torch.autograd.grad(part, everyone)
    loss = part.detach().clone()
    sum_over_ranks([loss], world)
    return loss, reduce_scatter_rows(gradient, world)
