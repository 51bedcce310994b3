"""Losses on a batch of embeddings: pure functions that know no process group, no settings and no device policy."""

from training.losses.batch_rank_loss import batch_rank_loss
from training.losses.blackbox_ap import (
    blackbox_average_precision,
    blackbox_average_precision_with_gradient,
)
from training.losses.mixing import PairMixing, draw_mixing, mixing_coefficients, mixing_pairs
from training.losses.rank_statistics import RankStatistics
from training.losses.recall_at_k import (
    Definition,
    recall_at_k_surrogate,
    recall_at_k_with_gradient,
    surrogate_floor,
)
from training.losses.smooth_ap import (
    smooth_average_precision,
    smooth_average_precision_with_gradient,
)
from training.losses.smooth_ranks import LossAtRanks, LossOfRanks, RankLoss, Ranks, smooth_rank_loss

__all__ = [
    "Definition",
    "LossAtRanks",
    "LossOfRanks",
    "PairMixing",
    "RankLoss",
    "RankStatistics",
    "Ranks",
    "batch_rank_loss",
    "blackbox_average_precision",
    "blackbox_average_precision_with_gradient",
    "draw_mixing",
    "mixing_coefficients",
    "mixing_pairs",
    "recall_at_k_surrogate",
    "recall_at_k_with_gradient",
    "smooth_average_precision",
    "smooth_average_precision_with_gradient",
    "smooth_rank_loss",
    "surrogate_floor",
]
