"""Settings of the optimizers and of the learning rate; imports no torch."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from lookalike.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class LearningRateSettings(Settings):
    """What all optimizers share: learning rates, their course, weight decay and clipping."""

    lr: PositiveFloat
    """Highest learning rate of the backbone."""
    projection_lr_multiplier: PositiveFloat = 1.0
    """Times the learning rate for the projection, which starts untrained."""
    pooling_lr_multiplier: PositiveFloat | None = None
    """Times the learning rate for the pooling's power; null takes that of the projection."""
    weight_decay: NonNegativeFloat = 1e-4
    """Of matrices and kernels."""
    decays_every_parameter: bool = False
    """Decays norms, biases, the pooling's power and what a loss learns, too, as the paper's released code does."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    warmup_epochs: NonNegativeInt = 0
    """The same in epochs."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """What follows the warm-up: a cosine to 0 at the end, drops by a factor, or nothing."""
    unit: Literal["step", "epoch"] = "step"
    """Whether the schedule moves on after each step or after each epoch, and what its drops are counted in."""
    decay_every: PositiveInt | None = None
    """Steps or epochs, from the end of the warm-up, between two drops of schedule `step`."""
    milestones: tuple[PositiveInt, ...] | None = None
    """In place of `decay_every`: steps or epochs, from the start of the run, after which schedule `step` drops."""
    decay_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Times the learning rate at each drop of schedule `step`."""
    max_gradient_norm: PositiveFloat | None = None
    """Clips the gradient's 2-norm over all parameters."""

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "LearningRateSettings":
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("give warmup_steps or warmup_epochs, not both")
        drops = (self.decay_every, self.milestones)
        if self.schedule == "step" and drops.count(None) != 1:
            raise ValueError("schedule step needs decay_every or milestones, one of them")
        if self.schedule != "step" and (drops.count(None) != 2 or self.decay_factor != 0.1):
            raise ValueError(f"decay_every, milestones and decay_factor have no effect with schedule {self.schedule}")
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must ascend, found {list(self.milestones)}")
        return self


class _AdamOptions(LearningRateSettings):
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decays of the averages of the gradient and of its square."""
    epsilon: PositiveFloat = 1e-8
    """Keeps the division by the root of the square finite."""
    keeps_largest_square: bool = False
    """AMSGrad: divides by the largest average square so far."""


class AdamWSettings(_AdamOptions):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"


class AdamSettings(_AdamOptions):
    """Adam whose weight decay is part of the gradient."""

    name: Literal["adam"]


class SGDSettings(LearningRateSettings):
    """Gradient descent with momentum; weight decay is part of the gradient."""

    name: Literal["sgd"] = "sgd"
    momentum: Beta = 0.9
    """Decay of the sum of past gradients."""
    nesterov: bool = False
    """Looks ahead along the momentum."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGDSettings":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov has no effect without momentum")
        return self


OptimizerSettings = Annotated[
    AdamWSettings | AdamSettings | SGDSettings,
    Field(discriminator="name"),
    BeforeValidator(lambda tree: {"name": "adamw", **tree} if isinstance(tree, dict) else tree),
]
