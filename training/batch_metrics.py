"""What a batch's embeddings say about progress, beside the loss."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Similarities held at a time: 16 MB of float32.
_BLOCK_ENTRIES = 1 << 22

METRIC_KS = (1, 4, 16)


def neighbour_counts(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch"],
    *,
    share: tuple[int, int] = (0, 1),
    ks: Sequence[int] = METRIC_KS,
) -> dict[str, tuple[float, float]]:
    """True hit rate and recall at k of one process's queries among all other images, as (sum, number of queries).

    `hit_rate_at_k`: a query's k nearest hold one of its class. `recall_at_k`: the fraction of its class among them.
    A query that is alone in its class is left out. Sums over processes add up. Block by block: memory does not grow
    with the square of the batch.
    """
    num_others = len(labels) - 1
    worker, num_workers = share
    rows = torch.arange(len(labels) * worker // num_workers, len(labels) * (worker + 1) // num_workers)
    hits, found, num_queries = [0] * len(ks), [0.0] * len(ks), 0
    for block in rows.to(labels.device).split(max(1, _BLOCK_ENTRIES // len(labels))):
        similarities = embeddings[block] @ embeddings.T
        similarities.scatter_(1, block[:, None], -torch.inf)
        nearest = similarities.topk(min(max(ks), num_others), dim=1).indices
        is_relevant = labels[nearest] == labels[block, None]  # [queries, k]
        num_relevant = (labels[block, None] == labels).sum(1) - 1
        is_query = num_relevant > 0
        for index, k in enumerate(ks):
            num_found = is_relevant[:, :k].sum(1)
            hits[index] += int((num_found > 0).sum())
            found[index] += float((num_found[is_query].double() / num_relevant[is_query]).sum())
        num_queries += int(is_query.sum())
    counts: dict[str, tuple[float, float]] = {}
    for k, num_hits, fraction in zip(ks, hits, found, strict=True):
        counts[f"hit_rate_at_{k}"] = (float(num_hits), float(num_queries))
        counts[f"recall_at_{k}"] = (fraction, float(num_queries))
    return counts


def embedding_spread(embeddings: Float[Tensor, "batch dim"]) -> float:
    """Variance of unit-length rows: 0 where they all point one way, near 1 where they point everywhere."""
    return 1 - float(embeddings.mean(dim=0).square().sum())
