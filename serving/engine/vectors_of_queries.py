"""The parts of a query -> one vector of unit length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray
from PIL import Image

from data_pipelines.decode import CroppablePicture, DecodeLimits, cropped, decode_image
from data_pipelines.sources import pixel_box
from lookalike.encoder_settings import InputSettings
from lookalike.errors import DecodeError
from serving.engine.errors import UnsearchableRegionError, UnsearchableVectorError
from serving.engine.queries import Region, Vector

# Unit vectors add up to noise below this length, whose direction says nothing.
_LEAST_LENGTH = 1e-5
# A scaled JPEG keeps so many pixels for each that the encoder sees.
_PIXELS_KEPT = 2


def unit_vector(values: Vector, *, dim: int) -> Float64[ndarray, "dim"]:
    """Raises UnsearchableVectorError for another length, no direction, NaN or infinity."""
    vector = np.asarray(values, np.float64)
    if vector.shape != (dim,):
        raise UnsearchableVectorError("wrong_dim", f"the vector has length {vector.size}, this index holds {dim}")
    if not np.isfinite(vector).all():
        raise UnsearchableVectorError("not_finite", "the vector holds NaN or infinity")
    # Scaled first, because squares of very large or small values leave the range of floats.
    largest = np.abs(vector).max()
    if largest == 0:
        raise UnsearchableVectorError("no_direction", "the vector is all zeros")
    vector = vector / largest
    unit: Float64[ndarray, dim] = vector / np.linalg.norm(vector)
    return unit


def combined(vectors: Sequence[ndarray], weights: Sequence[float]) -> Float32[ndarray, "dim"]:
    """The sum of each weight times its unit vector, at unit length.

    A single vector of positive weight stays as it is, to the last bit.

    Raises:
        UnsearchableVectorError: the sum vanishes, or a weight is not finite.
    """
    if len(vectors) == 1 and weights[0] > 0:
        return vectors[0].astype(np.float32)
    if not np.isfinite(weights).all():
        raise UnsearchableVectorError("not_finite", "a weight is NaN or infinity")
    scale = np.abs(weights).max()
    if scale == 0:
        raise UnsearchableVectorError("no_direction", "all weights are zero")
    shares = np.asarray(weights, np.float64) / scale
    total = shares @ np.stack(vectors).astype(np.float64)
    length = np.linalg.norm(total)
    if length < _LEAST_LENGTH:
        raise UnsearchableVectorError("cancelled_out", "the parts of the query cancel each other out")
    result: Float32[ndarray, dim] = (total / length).astype(np.float32)
    return result


def decoded(
    picture: bytes, roi: Region | None, *, limits: DecodeLimits, expected: InputSettings, is_scaled: bool
) -> Image.Image:
    """The picture, or its region, as the shards would hold it.

    Args:
        is_scaled: Whether a whole JPEG may be decoded at a fraction of its size, with at least two pixels for each that
            is seen: not quite the same picture then.

    Raises:
        DecodeError: the bytes are not a picture within `limits`.
        UnsearchableRegionError: the region has no pixel, or none of the picture.
    """
    if roi is None:
        return _scaled(picture, limits, expected) if is_scaled else decode_image(picture, limits=limits)
    box = _region_box(roi)
    # Whole and at full size also for a small region: shards store regions so, and pixels must be theirs.
    return _region(decode_image(picture, limits=limits), box)


def _scaled(picture: bytes, limits: DecodeLimits, expected: InputSettings) -> Image.Image:
    croppable = CroppablePicture(picture, limits=limits)
    seen = max(expected.size, expected.resize_to or 0, expected.max_side or 0)
    return Image.fromarray(croppable.decode_crop((0, 0, *croppable.size), at_least=_PIXELS_KEPT * seen))


def _region_box(roi: Region) -> tuple[int, int, int, int]:
    try:
        return pixel_box(roi)
    except ValueError as error:
        found = ", ".join(f"{corner:g}" for corner in roi)
        raise UnsearchableRegionError("empty", f"the region {found} holds no pixel") from error


def _region(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    try:
        return cropped(image, box)
    except DecodeError as error:
        found = ", ".join(f"{corner:g}" for corner in box)
        detail = f"the region {found} is outside the upright picture, {image.width} x {image.height} pixels"
        raise UnsearchableRegionError("outside", detail) from error
