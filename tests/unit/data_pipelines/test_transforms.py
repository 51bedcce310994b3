"""Pixels depend on the picture, the settings and the seed, and on nothing else."""

import io
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decode import CroppablePicture
from data_pipelines.rand_augment import rand_augment
from data_pipelines.settings import AugmentationSettings, RandAugment
from data_pipelines.transforms import EvaluationTransform, TrainingTransform
from lookalike.encoder_settings import InputSettings
from lookalike.settings import dump_settings

EVERYTHING = AugmentationSettings(
    rotation_degrees=30,
    rotation_fill="edge",
    rand_augment=RandAugment(),
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale_probability=0.3,
    blur_probability=0.5,
    erasing_probability=0.5,
)
OFF = AugmentationSettings(crop_scale=(1, 1), crop_ratio=None, flip_probability=0)


def picture(width: int = 100, height: int = 80, *, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def croppable(image: Image.Image) -> CroppablePicture:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return CroppablePicture(buffer.getvalue())


def test_evaluation_equals_resize_then_centre_crop():
    transform = EvaluationTransform(InputSettings(size=32, resize_to=40))
    image = picture(100, 80)
    resized = image.resize((50, 40), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((9, 4, 41, 36))).transpose(2, 0, 1).astype(int)
    # Rounding differs by one level where the two passes of the filter round in another order.
    assert np.abs(transform(image) - expected).max() <= 1


def test_evaluation_without_crop_fills_the_square():
    transform = EvaluationTransform(InputSettings(size=16))
    expected = np.asarray(picture().resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(transform(picture()), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (17, 16)])
def test_evaluation_takes_any_shape(size):
    for settings in (InputSettings(size=16), InputSettings(size=16, resize_to=18)):
        pixels = EvaluationTransform(settings)(picture(*size))
        assert pixels.shape == (3, 16, 16)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 80), (64, 51)), ((80, 100), (51, 64)), ((60, 20), (60, 20)), ((2000, 3), (64, 1))]
)
def test_evaluation_at_a_maximal_side_keeps_the_shape_and_never_enlarges(size, expected):
    image = picture(*size)
    pixels = EvaluationTransform(InputSettings(max_side=64))(image)
    np.testing.assert_array_equal(
        pixels, np.asarray(image.resize(expected, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    )


def test_settings_of_no_effect_are_refused():
    with pytest.raises(ValueError, match="resize_to has no effect with max_side"):
        InputSettings(resize_to=256, max_side=512)


def test_settings_that_are_not_used_leave_no_trace():
    """Encoders stored before there were such settings keep their fingerprints."""
    assert dump_settings(InputSettings()) == {"size": 224, "resize_to": None, "interpolation": "bicubic"}
    every = InputSettings(max_side=64, scales=(0.5, 1.0))
    assert InputSettings.model_validate(dump_settings(every)) == every
    fingerprints = {InputSettings(**used).fingerprint for used in ({}, {"max_side": 64}, {"scales": (0.5, 1.0)})}
    assert len(fingerprints) == 3


def test_evaluation_carries_the_fingerprint_of_its_settings():
    assert EvaluationTransform(InputSettings(size=16)).fingerprint == InputSettings(size=16).fingerprint


def test_training_depends_on_the_seed_only():
    transform = TrainingTransform(EVERYTHING, 32)
    first = [transform(croppable(picture()), seed=seed) for seed in range(20)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = [TrainingTransform(EVERYTHING, 32)(croppable(picture()), seed=seed) for seed in reversed(range(20))]
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({pixels.tobytes() for pixels in first}) == 20


def test_all_off_is_a_plain_resize():
    expected = np.asarray(picture().resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    pixels = TrainingTransform(OFF, 32)(croppable(picture()), seed=5)
    # torch and Pillow round the filter's weights differently.
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.2, 0.5)},
        {"crop_ratio": (0.5, 0.6)},
        {"flip_probability": 1.0},
        {"rotation_degrees": 20},
        {"rotation_degrees": 20, "rotation_fill": "edge"},
        {"rand_augment": {"magnitude": 20}},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"hue": 0.2},
        {"grayscale_probability": 1.0},
        {"blur_probability": 1.0, "blur_sigma": (2.0, 2.0)},
        {"erasing_probability": 1.0},
    ],
)
def test_each_part_changes_the_pixels(change):
    settings = AugmentationSettings(**{**OFF.model_dump(), **change})
    pixels = TrainingTransform(settings, 32)(croppable(picture()), seed=3)
    assert pixels.shape == (3, 32, 32)
    assert (pixels != TrainingTransform(OFF, 32)(croppable(picture()), seed=3)).any()


def test_a_rotation_fills_its_corners_as_asked():
    image = Image.new("RGB", (64, 64), (10, 20, 30))
    turned = {"rotation_degrees": 45, "crop_scale": (1, 1), "crop_ratio": None}
    on_white, on_edge = (
        TrainingTransform(AugmentationSettings(**turned, rotation_fill=fill), 64) for fill in ("white", "edge")
    )
    assert on_white(croppable(image), seed=0).max() == 255
    np.testing.assert_array_equal(np.unique(on_edge(croppable(image), seed=0)), [10, 20, 30])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_training_takes_any_shape(size):
    assert TrainingTransform(EVERYTHING, 16)(croppable(picture(*size)), seed=0).shape == (3, 16, 16)


@pytest.mark.parametrize("change", [{"crop_scale": (0.5, 0.2)}, {"crop_scale": (0.5, 1.5)}, {"blur_sigma": (2.0, 1.0)}])
def test_ranges_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AugmentationSettings(**change)


def test_importing_settings_and_transforms_loads_no_torch():
    program = "import sys, data_pipelines.transforms, data_pipelines.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_rand_augment_has_the_operations_of_torchvision():
    """Under torchvision's own class and under ours, a picture can become the same things."""
    from data_pipelines.transforms import _torchvision_functional

    functional = _torchvision_functional()
    from torchvision.transforms import v2

    image = picture(40, 30).point(lambda value: 30 + value * 3 // 4)  # or else there were no contrast to stretch
    settings = RandAugment(num_operations=1, magnitude=12)
    oracle = v2.RandAugment(1, 12, interpolation=v2.InterpolationMode.BILINEAR, fill=[255, 255, 255])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = distinct(oracle(image) for _ in range(400))
    random = np.random.default_rng(0)
    found = distinct(rand_augment(image, settings, random, functional=functional) for _ in range(400))
    # 14 operations, 9 of them in two directions.
    assert len(expected) == len(found) == 23
    distances = np.abs(expected[:, None] - found[None]).mean(axis=(2, 3, 4))
    # torchvision computes strengths in single precision: a pixel may differ by one level.
    np.testing.assert_array_equal((distances < 0.3).sum(axis=0), 1)
    np.testing.assert_array_equal((distances < 0.3).sum(axis=1), 1)


def distinct(images: Iterable[Image.Image]) -> np.ndarray:
    return np.stack(
        [np.frombuffer(data, np.uint8).reshape(30, 40, 3) for data in {i.tobytes() for i in images}]
    ).astype(int)
