"""Settings of the losses and of what changes in them while training; imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from lookalike.settings import Settings

Ks = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class LinearChange(Settings):
    """A number that moves evenly from one value to another and then stays."""

    schedule: Literal["linear"] = "linear"
    start: PositiveFloat
    """At step 0."""
    end: PositiveFloat
    """From step `num_steps` on."""
    num_steps: PositiveInt
    """Steps from `start` to `end`."""


class LiveFractionTarget(Settings):
    """A number that is raised while too few queries of the batch have a gradient, and lowered while too many have."""

    schedule: Literal["live_fraction"] = "live_fraction"
    target: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the batch's queries that should have a gradient."""
    lowest: PositiveFloat
    """The number never falls below."""
    highest: PositiveFloat
    """The number never rises above; it starts there, since an untrained encoder needs the widest sigmoid."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Weight of the past in the moving average of the share."""
    gain: PositiveFloat = 0.5
    """Change of the number's logarithm in a step, per unit of the share's distance from its target."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "LiveFractionTarget":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be below highest ({self.highest})")
        return self


def _schedule_kind(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("schedule"))
    return str(getattr(value, "schedule", "constant"))


def _by_schedule(expected: str) -> Discriminator:
    """Args: expected: For people, what may stand in the place."""
    return Discriminator(_schedule_kind, custom_error_type="schedule", custom_error_message=f"expected {expected}")


Scheduled = Annotated[
    Annotated[PositiveFloat, Tag("constant")]
    | Annotated[LinearChange, Tag("linear")]
    | Annotated[LiveFractionTarget, Tag("live_fraction")],
    _by_schedule("a number, or a mapping with schedule linear or live_fraction"),
]


class LinearChangeOfKs(Settings):
    """Depths that move evenly, each from its first value to its last, rounded, and then stay."""

    schedule: Literal["linear"] = "linear"
    start: Ks
    """At step 0."""
    end: Ks
    """From step `num_steps` on; as many as in `start`."""
    num_steps: PositiveInt
    """Steps from `start` to `end`."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> "LinearChangeOfKs":
        if len(self.start) != len(self.end):
            raise ValueError(f"start and end must have the same length, got {len(self.start)} and {len(self.end)}")
        return self


ScheduledKs = Annotated[
    Annotated[Ks, Tag("constant")] | Annotated[LinearChangeOfKs, Tag("linear")],
    _by_schedule("a list, or a mapping with schedule linear"),
]


class MixingSettings(Settings):
    """Which virtual samples similarity mixup (SiMix) adds; the defaults are the paper's."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of all pairs of a class, those that are mixed in a step."""
    beta: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """(a, b) of the Beta distribution of the coefficients: 1, 1 is uniform, above it samples crowd in the middle."""


class MixingLoss(Settings):
    """What the losses share that can mix similarities."""

    mixes_similarities: bool = False
    """SiMix: adds the virtual mixtures of each class's pairs as queries, positives and negatives."""
    mixing: MixingSettings = MixingSettings()
    """How, where `mixes_similarities` is set."""

    @model_validator(mode="after")
    def _mixing_has_an_effect(self) -> "MixingLoss":
        if not self.mixes_similarities and self.mixing != MixingSettings():
            raise ValueError("mixing has no effect without mixes_similarities")
        return self


class RecallAtKLoss(MixingLoss):
    """RS@k, the recall@k surrogate, with similarity mixup (SiMix)."""

    name: Literal["recall_at_k"] = "recall_at_k"
    ks: ScheduledKs = (1, 2, 4, 8, 16)
    """The k of recall@k; the loss is their mean."""
    rank_temperature: Scheduled = 0.01
    """Width of the sigmoid that counts better-ranked images, in cosine similarity."""
    k_temperature: Scheduled = 1.0
    """Width of the sigmoid that compares a rank with k, in ranks."""
    definition: Literal["paper", "released"] = "paper"
    """The paper's formula, or that of its released code, which ranks the query itself, too."""


class SmoothAPLoss(MixingLoss):
    """Smooth-AP: average precision of smooth ranks."""

    name: Literal["smooth_ap"] = "smooth_ap"
    rank_temperature: Scheduled = 0.01
    """Width of the sigmoid that counts better-ranked images, in cosine similarity."""


class BlackboxAPLoss(Settings):
    """Average precision of hard ranks, differentiated by ranking again under a push."""

    name: Literal["blackbox_ap"] = "blackbox_ap"
    interpolation: PositiveFloat = 4.0
    """Strength of the push."""
    margin: NonNegativeFloat = 0.02
    """Cosine similarity by which positives must lead."""


class ContrastiveLoss(Settings):
    """Pulls pairs of a class together and pushes others apart; with a memory, against earlier batches, too (XBM)."""

    name: Literal["contrastive"] = "contrastive"
    positive_margin: Annotated[float, Field(ge=-1, le=1)] = 1.0
    """Cosine similarity above which a pair of one class costs nothing."""
    negative_margin: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Cosine similarity below which a pair of two classes costs nothing."""
    memory_size: PositiveInt | None = None
    """Embeddings of earlier batches to compare with, at least a batch; null has no memory."""
    memory_start_step: NonNegativeInt = 0
    """First step that looks into the memory: early embeddings change too fast to be remembered."""

    @model_validator(mode="after")
    def _start_has_a_memory(self) -> "ContrastiveLoss":
        if self.memory_start_step and self.memory_size is None:
            raise ValueError("memory_start_step has no effect without memory_size")
        return self


class TripletLoss(Settings):
    """The distance to a positive stays a margin below that to a negative. Looks at batch * images * batch triplets."""

    name: Literal["triplet"] = "triplet"
    margin: PositiveFloat = 0.1
    """Difference of Euclidean distances between unit vectors."""
    triplets: Literal["semihard", "hard", "all"] = "semihard"
    """Negatives beyond the positive but inside the margin, negatives nearer than the positive, or both."""


class MarginLoss(Settings):
    """Distances to positives and negatives are kept on the two sides of a boundary."""

    name: Literal["margin"] = "margin"
    margin: PositiveFloat = 0.2
    """Half the width of the gap around the boundary, in Euclidean distance."""
    boundary: PositiveFloat = 1.2
    """The distance that separates positives from negatives."""
    learns_boundary: bool = False
    """Trains the boundary, one for all classes."""
    boundary_lr_multiplier: PositiveFloat = 1.0
    """Times optimizer.lr for the boundary."""
    triplets: Literal["distance_weighted", "all"] = "distance_weighted"
    """One negative drawn evenly over distances for each pair, or every one."""

    @model_validator(mode="after")
    def _multiplier_is_used(self) -> "MarginLoss":
        if not self.learns_boundary and self.boundary_lr_multiplier != 1:
            raise ValueError("boundary_lr_multiplier has no effect without learns_boundary")
        return self


class MultiSimilarityLoss(Settings):
    """Pairs weighted by how they compare with the other pairs of their image."""

    name: Literal["multi_similarity"] = "multi_similarity"
    positive_scale: PositiveFloat = 2.0
    """Sharpness of the positive part."""
    negative_scale: PositiveFloat = 50.0
    """Sharpness of the negative part."""
    boundary: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Cosine similarity that separates positives from negatives."""
    mining_margin: NonNegativeFloat | None = 0.1
    """Keeps pairs that are within this of the hardest opposite pair; null keeps all."""


class ProxyNCALoss(Settings):
    """Softmax over the distances to one learned proxy per class (ProxyNCA++)."""

    name: Literal["proxy_nca"] = "proxy_nca"
    scale: PositiveFloat = 9.0
    """Times the squared distances, the inverse of a temperature."""
    proxy_lr_multiplier: PositiveFloat = 100.0
    """Times optimizer.lr for the proxies, each of which only a few images move."""


class NormalisedSoftmaxLoss(Settings):
    """Classification of unit vectors by unit class weights."""

    name: Literal["normalised_softmax"] = "normalised_softmax"
    temperature: PositiveFloat = 0.05
    """Divides cosine similarities."""
    weight_lr_multiplier: PositiveFloat = 1.0
    """Times optimizer.lr for the class weights."""


class FastAPLoss(Settings):
    """Average precision through soft histograms of distances. Memory grows with bins * batch²."""

    name: Literal["fast_ap"] = "fast_ap"
    num_bins: PositiveInt = 10
    """Bins of the histogram over squared distances from 0 to 4."""


LossSettings = Annotated[
    RecallAtKLoss
    | SmoothAPLoss
    | BlackboxAPLoss
    | ContrastiveLoss
    | TripletLoss
    | MarginLoss
    | MultiSimilarityLoss
    | ProxyNCALoss
    | NormalisedSoftmaxLoss
    | FastAPLoss,
    Field(discriminator="name"),
    # The loss that the project is about needs no name.
    BeforeValidator(lambda tree: {"name": "recall_at_k", **tree} if isinstance(tree, dict) else tree),
]
