"""From the settings of a loss to the loss: the one place that knows all of them."""

from jaxtyping import Int64
from torch import Tensor

from training.loss_settings import (
    BlackboxAPLoss,
    ContrastiveLoss,
    FastAPLoss,
    LinearChange,
    LinearChangeOfKs,
    LiveFractionTarget,
    LossSettings,
    MarginLoss,
    MultiSimilarityLoss,
    NormalisedSoftmaxLoss,
    ProxyNCALoss,
    RecallAtKLoss,
    SmoothAPLoss,
    TripletLoss,
)
from training.losses import library
from training.losses.batch_loss import BatchLoss
from training.losses.scheduled_rank_losses import (
    BlackboxAP,
    ScheduledRecallAtK,
    ScheduledSmoothAP,
    SimilarityMixup,
)
from training.schedules import KsSchedule, LinearSchedule, LiveFractionController, Schedule, constant, ks_schedule


def create_loss(settings: LossSettings, *, dim: int, classes: Int64[Tensor, "classes"], seed: int) -> BatchLoss:
    """A new loss; what it learns starts random (torch's global generator).

    Args:
        dim: Of the embeddings.
        classes: All labels of the training pictures, ascending.
        seed: Of mixing and mining.

    Raises:
        ResourceError: the loss comes from a library that is not installed.
    """
    match settings:
        case RecallAtKLoss():
            return ScheduledRecallAtK(
                ks=ks_of(settings.ks),
                rank_temperature=schedule_of(settings.rank_temperature),
                k_temperature=schedule_of(settings.k_temperature),
                definition=settings.definition,
                mixup=_mixup_of(settings, seed=seed),
            )
        case SmoothAPLoss():
            return ScheduledSmoothAP(
                rank_temperature=schedule_of(settings.rank_temperature), mixup=_mixup_of(settings, seed=seed)
            )
        case BlackboxAPLoss():
            return BlackboxAP(interpolation=settings.interpolation, margin=settings.margin)
        case ContrastiveLoss():
            return library.contrastive_loss(
                positive_margin=settings.positive_margin,
                negative_margin=settings.negative_margin,
                memory_size=settings.memory_size,
                start_step=settings.memory_start_step,
                dim=dim,
            )
        case TripletLoss():
            return library.triplet_loss(margin=settings.margin, triplets=settings.triplets)
        case MarginLoss():
            return library.margin_loss(
                margin=settings.margin,
                boundary=settings.boundary,
                learns_boundary=settings.learns_boundary,
                triplets=settings.triplets,
                lr_multiplier=settings.boundary_lr_multiplier,
                seed=seed,
            )
        case MultiSimilarityLoss():
            return library.multi_similarity_loss(
                positive_scale=settings.positive_scale,
                negative_scale=settings.negative_scale,
                boundary=settings.boundary,
                mining_margin=settings.mining_margin,
            )
        case ProxyNCALoss():
            return library.proxy_nca_loss(
                scale=settings.scale, classes=classes, dim=dim, lr_multiplier=settings.proxy_lr_multiplier
            )
        case NormalisedSoftmaxLoss():
            return library.normalised_softmax_loss(
                temperature=settings.temperature,
                classes=classes,
                dim=dim,
                lr_multiplier=settings.weight_lr_multiplier,
            )
        case FastAPLoss():
            return library.fast_ap_loss(num_bins=settings.num_bins)


def loss_learns(settings: LossSettings) -> bool:
    """Whether the loss has parameters of its own."""
    match settings:
        case ProxyNCALoss() | NormalisedSoftmaxLoss():
            return True
        case MarginLoss():
            return settings.learns_boundary
        case _:
            return False


def _mixup_of(settings: RecallAtKLoss | SmoothAPLoss, *, seed: int) -> SimilarityMixup | None:
    if not settings.mixes_similarities:
        return None
    return SimilarityMixup(seed=seed, share=settings.mixing.share, beta=settings.mixing.beta)


def schedule_of(settings: float | LinearChange | LiveFractionTarget) -> Schedule:
    """The course of one number."""
    match settings:
        case LinearChange():
            return LinearSchedule(settings.start, settings.end, settings.num_steps)
        case LiveFractionTarget():
            return LiveFractionController(
                target=settings.target,
                lowest=settings.lowest,
                highest=settings.highest,
                smoothing=settings.smoothing,
                gain=settings.gain,
            )
        case _:
            return constant(settings)


def ks_of(settings: tuple[int, ...] | LinearChangeOfKs) -> KsSchedule:
    """The course of the depths of recall@k."""
    if isinstance(settings, LinearChangeOfKs):
        return ks_schedule(settings.start, settings.end, settings.num_steps)
    return ks_schedule(settings, settings, 1)
