"""RGB pictures -> uint8 pixels: one evaluation transform for all stages, one seeded transform for training."""

import functools
import math
from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageFilter

from data_pipelines.decode import CroppablePicture
from data_pipelines.rand_augment import rand_augment
from data_pipelines.settings import AugmentationSettings
from lookalike.encoder_settings import InputSettings

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_ATTEMPTS = 10
_ERASING_RATIO = (0.3, 3.3)


class EvaluationTransform:
    """The transform of validation, embedding and queries; equal fingerprints give equal pixels on every machine."""

    def __init__(self, settings: InputSettings) -> None:
        self.settings = settings
        self.fingerprint = settings.fingerprint

    def __call__(self, image: Image.Image) -> UInt8[ndarray, "3 height width"]:
        """A square, or with `max_side` a picture that keeps its shape."""
        size, box = (self.settings.size, self.settings.size), self._box(*image.size)
        if self.settings.max_side is not None:
            shrinking = min(1.0, self.settings.max_side / max(image.size))
            size = (max(1, round(image.width * shrinking)), max(1, round(image.height * shrinking)))
        return _pixels(image.resize(size, _RESAMPLING[self.settings.interpolation], box=box))

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What of the picture is seen, in its own pixels.

        Resizing the box equals resizing the picture and cropping its centre, without ever building the rows that
        are cropped away: a panorama costs no more than any other picture.
        """
        if self.settings.resize_to is None:
            return (0.0, 0.0, float(width), float(height))
        side = min(width, height) * self.settings.size / self.settings.resize_to
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)


class TrainingTransform:
    """Random crop, flip, rotation, colours, blur and erasing, all chosen by the seed of the call and nothing else."""

    def __init__(self, settings: AugmentationSettings, size: int) -> None:
        self.settings = settings
        self.size = size

    def __call__(self, picture: CroppablePicture, *, seed: int) -> UInt8[ndarray, "3 size size"]:
        random = np.random.default_rng(seed)
        settings = self.settings
        box = _random_box(*picture.size, settings, random)
        pixels = _resized(picture.decode_crop(box, at_least=self.size), self.size, settings.interpolation)
        if _happens(settings.flip_probability, random):
            pixels = pixels[:, :, ::-1]
        if settings.distorts:
            pixels = _pixels(self._distorted(_image(pixels), random))
        pixels = np.ascontiguousarray(pixels)
        if _happens(settings.erasing_probability, random):
            _erase_rectangle(pixels, settings, random)
        return pixels

    def _distorted(self, image: Image.Image, random: Generator) -> Image.Image:
        settings = self.settings
        if settings.rotation_degrees:
            image = self._rotated(image, random)
        if settings.rand_augment is not None:
            image = rand_augment(image, settings.rand_augment, random, functional=_torchvision_functional())
        image = _with_colour_jitter(image, settings, random)
        if _happens(settings.grayscale_probability, random):
            image = image.convert("L").convert("RGB")
        if _happens(settings.blur_probability, random):
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*settings.blur_sigma)))
        return image

    def _rotated(self, image: Image.Image, random: Generator) -> Image.Image:
        degrees = self.settings.rotation_degrees
        angle = random.uniform(-degrees, degrees)
        if self.settings.rotation_fill == "white":
            return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor="white")
        margin = math.ceil(self.size * (math.sqrt(2) - 1) / 2) + 1
        padded = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
        rotated = Image.fromarray(padded).rotate(angle, Image.Resampling.BILINEAR)
        return rotated.crop((margin, margin, margin + self.size, margin + self.size))


def _random_box(
    width: int, height: int, settings: AugmentationSettings, random: Generator
) -> tuple[int, int, int, int]:
    """A box of random area, ratio and place; the largest centred one where the ratio does not fit ten times."""
    own_ratio = width / height
    lowest, highest = settings.crop_ratio or (own_ratio, own_ratio)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * random.uniform(*settings.crop_scale)
        ratio = math.exp(random.uniform(math.log(lowest), math.log(highest)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(random.integers(width - box_width + 1))
            top = int(random.integers(height - box_height + 1))
            return (left, top, left + box_width, top + box_height)
    ratio = min(max(own_ratio, lowest), highest)
    box_width, box_height = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return (left, top, left + box_width, top + box_height)


def _with_colour_jitter(image: Image.Image, settings: AugmentationSettings, random: Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter does."""
    functional = _torchvision_functional()
    changes = [
        (functional.adjust_brightness, settings.brightness, 1.0),
        (functional.adjust_contrast, settings.contrast, 1.0),
        (functional.adjust_saturation, settings.saturation, 1.0),
        (functional.adjust_hue, settings.hue, 0.0),
    ]
    for index in random.permutation(len(changes)):
        change, strength, neutral = changes[index]
        if strength:
            image = change(image, random.uniform(neutral - strength, neutral + strength))
    return image


def _erase_rectangle(pixels: UInt8[ndarray, "3 size size"], settings: AugmentationSettings, random: Generator) -> None:
    """Fills a rectangle with noise, in place.

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation", arXiv:1708.04896, algorithm 1, variant RE-R.
    """
    size = pixels.shape[1]
    area = size * size * random.uniform(*settings.erasing_scale)
    ratio = math.exp(random.uniform(math.log(_ERASING_RATIO[0]), math.log(_ERASING_RATIO[1])))
    height, width = min(size, round(math.sqrt(area * ratio))), min(size, round(math.sqrt(area / ratio)))
    top, left = int(random.integers(size - height + 1)), int(random.integers(size - width + 1))
    pixels[:, top : top + height, left : left + width] = random.integers(0, 256, (3, height, width), dtype=np.uint8)


def _happens(probability: float, random: Generator) -> bool:
    return bool(random.random() < probability)


def _resized(pixels: UInt8[ndarray, "height width 3"], size: int, interpolation: str) -> UInt8[ndarray, "3 size size"]:
    """Antialiased; four times as fast as Pillow's resize at these sizes."""
    import torch
    from torch.nn.functional import interpolate

    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return interpolate(batch, (size, size), mode=interpolation, antialias=True)[0].numpy()


def _pixels(image: Image.Image) -> UInt8[ndarray, "3 height width"]:
    # [height, width, 3] -> [3, height, width]
    return np.asarray(image).transpose(2, 0, 1).copy()


def _image(pixels: UInt8[ndarray, "3 height width"]) -> Image.Image:
    # [3, height, width] -> [height, width, 3]
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@functools.cache
def _torchvision_functional() -> ModuleType:
    import torch  # noqa: F401

    from lookalike.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    from torchvision.transforms.v2 import functional

    return functional
