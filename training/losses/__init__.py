"""Losses on a batch of embeddings: pure functions that know no process group, no settings and no device policy."""

from training.losses.mixing import mixing_coefficients, mixing_pairs
from training.losses.recall_at_k import (
    Definition,
    recall_at_k_surrogate,
    recall_at_k_with_gradient,
    surrogate_floor,
)
from training.losses.smooth_ranks import LossOfRanks, RankLoss, smooth_rank_loss

__all__ = [
    "Definition",
    "LossOfRanks",
    "RankLoss",
    "mixing_coefficients",
    "mixing_pairs",
    "recall_at_k_surrogate",
    "recall_at_k_with_gradient",
    "smooth_rank_loss",
    "surrogate_floor",
]
