"""RandAugment by torchvision's operations, with every choice drawn from the generator given.

torchvision's own class draws from torch's global generator, which the training that runs beside a thread of the loader
draws from, too.

Source: Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space",
arXiv:1909.13719, algorithm 1; operations and ranges are those of torchvision.transforms.v2.RandAugment.
"""

import math
from collections.abc import Callable
from types import ModuleType

from numpy.random import Generator
from PIL import Image

from data_pipelines.settings import RandAugment

_LARGEST_MAGNITUDE = 30
_WHITE = [255, 255, 255]
_LARGEST_SHEAR = 0.3
_LARGEST_TRANSLATION = 150 / 331  # of the side
_LARGEST_ROTATION = 30.0  # degrees
_LARGEST_CHANGE = 0.9  # of brightness, colour, contrast and sharpness

# torchvision's functions, a picture, and the strength from -1 to 1 -> the picture.
_Operation = Callable[[ModuleType, Image.Image, float], Image.Image]


def rand_augment(
    image: Image.Image, settings: RandAugment, random: Generator, *, functional: ModuleType
) -> Image.Image:
    """
    Args:
        functional: torchvision.transforms.v2.functional.
    """
    for _ in range(settings.num_operations):
        operation, is_signed = _OPERATIONS[int(random.integers(len(_OPERATIONS)))]
        sign = 2 * int(random.integers(2)) - 1 if is_signed else 1
        image = operation(functional, image, sign * settings.magnitude / _LARGEST_MAGNITUDE)
    return image


def _sheared(functional: ModuleType, image: Image.Image, x: float, y: float) -> Image.Image:
    degrees = [math.degrees(math.atan(_LARGEST_SHEAR * strength)) for strength in (x, y)]
    return functional.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0], fill=_WHITE, interpolation=2
    )


def _moved(functional: ModuleType, image: Image.Image, x: float, y: float) -> Image.Image:
    pixels = [int(_LARGEST_TRANSLATION * strength * side) for strength, side in zip((x, y), image.size, strict=True)]
    return functional.affine(
        image, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0], fill=_WHITE, interpolation=2
    )


# Each with whether its strength has a sign.
_OPERATIONS: tuple[tuple[_Operation, bool], ...] = (
    (lambda functional, image, strength: image, False),
    (lambda functional, image, strength: _sheared(functional, image, strength, 0.0), True),
    (lambda functional, image, strength: _sheared(functional, image, 0.0, strength), True),
    (lambda functional, image, strength: _moved(functional, image, strength, 0.0), True),
    (lambda functional, image, strength: _moved(functional, image, 0.0, strength), True),
    (lambda functional, image, strength: functional.rotate(image, _LARGEST_ROTATION * strength, 2, fill=_WHITE), True),
    (lambda functional, image, strength: functional.adjust_brightness(image, 1 + _LARGEST_CHANGE * strength), True),
    (lambda functional, image, strength: functional.adjust_saturation(image, 1 + _LARGEST_CHANGE * strength), True),
    (lambda functional, image, strength: functional.adjust_contrast(image, 1 + _LARGEST_CHANGE * strength), True),
    (lambda functional, image, strength: functional.adjust_sharpness(image, 1 + _LARGEST_CHANGE * strength), True),
    (lambda functional, image, strength: functional.posterize(image, 8 - round(4 * strength)), False),
    (lambda functional, image, strength: functional.solarize(image, 255 * (1 - strength)), False),
    (lambda functional, image, strength: functional.autocontrast(image), False),
    (lambda functional, image, strength: functional.equalize(image), False),
)
