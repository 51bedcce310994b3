"""Settings of shards and of augmentation. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from data_pipelines.decode import DecodeLimits
from lookalike.settings import Settings

Probability = Annotated[float, Field(ge=0, le=1)]


class KeepOriginal(Settings):
    """Store the bytes of the picture's file untouched."""

    encoding: Literal["original"] = "original"


class Reencode(Settings):
    """Store upright RGB JPEGs, shrunk where they are larger than needed."""

    encoding: Literal["jpeg"] = "jpeg"
    max_side: Annotated[int, Field(ge=16, le=16_384)]
    """Longer side, in pixels; smaller pictures keep their size."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG quality."""


Encoding = Annotated[KeepOriginal | Reencode, Field(discriminator="encoding")]


class ShardSettings(Settings):
    """How pictures become shards."""

    max_shard_bytes: Annotated[int, Field(ge=1 << 10)] = 256 << 20
    """A shard is closed before its source pictures exceed this many bytes; a larger picture gets its own."""
    max_quarantine_share: Probability = 0.01
    """More bad pictures than this share of all are an error."""
    encoding: Encoding = KeepOriginal()
    """What is stored of each picture."""
    limits: DecodeLimits = DecodeLimits()
    """Which pictures are acceptable."""


class ShardCacheSettings(Settings):
    """Where shards that lie elsewhere are kept, and how patiently they are fetched."""

    folder: Path
    """On a local disk; processes of a machine share it."""
    max_bytes: Annotated[int, Field(ge=1)] = 1 << 40
    """Size of the shards kept, without those being fetched; the least recently used are removed first."""
    num_attempts: Annotated[int, Field(ge=1)] = 6
    """How often a download is tried."""
    first_wait_seconds: PositiveFloat = 1.0
    """Longest pause before the second attempt, doubled for each later one; pauses are drawn up to it at random."""


class RandAugment(Settings):
    """Operations on colours and geometry, chosen anew for every picture; see `rand_augment.py`."""

    num_operations: Annotated[int, Field(ge=1)] = 2
    """How many are applied, one after the other."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """How strong they are."""


class AugmentationSettings(Settings):
    """The training transform: random crop, flip, rotation, colours, blur, erasing. Zeros and ones switch parts off."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    """Range of the crop's share of the picture's area; (1, 1) with crop_ratio None takes the whole picture."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] | None = (3 / 4, 4 / 3)
    """Range of the crop's width divided by its height; None keeps the picture's own ratio."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter, always antialiased."""
    flip_probability: Probability = 0.5
    """Of mirroring left and right."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation to either side."""
    rotation_fill: Literal["white", "edge"] = "white"
    """What fills the corners after a rotation."""
    rand_augment: RandAugment | None = None
    """RandAugment after the rotation; None leaves it out."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of brightness."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of contrast."""
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the hue; 0.5 is half a turn."""
    grayscale_probability: Probability = 0.0
    """Of removing the colours."""
    blur_probability: Probability = 0.0
    """Of a Gaussian blur."""
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels."""
    erasing_probability: Probability = 0.0
    """Of replacing a rectangle with noise."""
    erasing_scale: tuple[NonNegativeFloat, NonNegativeFloat] = (0.02, 0.33)
    """Range of the rectangle's share of the area."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "AugmentationSettings":
        for name in ("crop_scale", "crop_ratio", "blur_sigma", "erasing_scale"):
            bounds = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{name}: the first value ({bounds[0]}) is above the second ({bounds[1]})")
        for name in ("crop_scale", "erasing_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name}: a share of the area is at most 1, got {getattr(self, name)[1]}")
        return self

    @property
    def distorts(self) -> bool:
        """Whether anything is done to a picture beyond crop, flip and erasing."""
        return self.rand_augment is not None or any(
            (
                self.rotation_degrees,
                self.brightness,
                self.contrast,
                self.saturation,
                self.hue,
                self.grayscale_probability,
                self.blur_probability,
            )
        )


class ClassFoldersSettings(Settings):
    """Pictures in one folder per class."""

    folder: Path
    """ROOT/class/picture, ROOT/{train,test}/class/picture, or ROOT/picture without classes."""
    test_class_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the classes that become the split `test`, the rest `train`; None makes one split `all`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Chooses which classes are tested."""
    allows_shared_classes: bool = False
    """Accept classes that are in more than one split."""


class ListingSettings(Settings):
    """Pictures named by a table."""

    file: Path
    """CSV or Parquet with the column path, and optionally label, coarse_label, split, key."""
