"""Whether a step taught anything: the numbers of a step's event, over all processes."""

from collections.abc import Mapping

import torch

from lookalike.collectives import sum_over_ranks
from lookalike.world import World
from training.batch_metrics import embedding_spread, neighbour_counts
from training.distributed_loss import ScoredBatch
from training.losses.batch_loss import BatchLoss


def measure_batch(scored: ScoredBatch, loss: BatchLoss, *, step: int, world: World) -> dict[str, float]:
    """The numbers of a scored batch: the loss, true retrieval in the batch, and what the loss says of its gradient.

    Costs one product of all embeddings with all, split over processes, and one short message. Every process gets the
    same bits.
    """
    counts = {
        **neighbour_counts(scored.embeddings, scored.labels, share=(world.rank, world.size)),
        **scored.share.counts,
    }
    total = scored.loss.item()
    floor = loss.floor(scored.labels, step=step)
    return {
        "loss": total,
        **({} if floor is None else {"loss_above_floor": total - floor}),
        **shares_over_ranks(counts, world=world, device=scored.loss.device),
        "embedding_spread": embedding_spread(scored.embeddings),
        **loss.numbers(step=step),
    }


def shares_over_ranks(
    counts: Mapping[str, tuple[float, float]], *, world: World, device: torch.device
) -> dict[str, float]:
    """(how many, of how many) of each process -> how large a share over all of them; 0 of 0 is 0.

    One message for all; every process brings the same names in the same order.
    """
    table = torch.tensor(list(counts.values()), dtype=torch.float64, device=device).view(-1, 2)
    sum_over_ranks([table], world)
    return {name: part / whole if whole else 0.0 for name, (part, whole) in zip(counts, table.tolist(), strict=True)}
