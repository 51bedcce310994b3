"""Picture bytes -> RGB as a viewer shows it, or a DecodeError with a reason. Imports no torch."""

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Annotated, Literal

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageCms
from pydantic import Field, PositiveInt

from data_pipelines import fast_jpeg
from lookalike.errors import DecodeError
from lookalike.settings import Settings

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]

_ORIENTATION_TAG = 0x0112
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)
_FIRST_BYTES: dict[ImageFormat, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_SIXTEEN_BIT_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


class DecodeLimits(Settings):
    """What a picture may be; compared with its header before any pixel is decoded."""

    max_pixels: PositiveInt = 50_000_000
    """Width times height."""
    max_side: PositiveInt = 30_000
    """Longer side, in pixels."""
    min_side: PositiveInt = 1
    """Shorter side, in pixels."""
    max_bytes: PositiveInt = 256 << 20
    """Size of the encoded picture."""
    formats: Annotated[tuple[ImageFormat, ...], Field(min_length=1)] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    """Formats that are opened at all."""


_DEFAULT_LIMITS = DecodeLimits()
# Of what was held against limits before, when it came into a gallery: those of today's clients have no say in it.
ANY_PICTURE = DecodeLimits(max_pixels=1 << 32, max_side=1 << 20, max_bytes=1 << 31)


def decode_image(data: bytes, *, limits: DecodeLimits = _DEFAULT_LIMITS) -> Image.Image:
    """Decodes to mode RGB: upright, sRGB, 8 bits a channel, transparency on white, the first frame of an animation.

    Raises:
        DecodeError: for anything that is not a whole picture within `limits`; never another error, never a warning.
    """
    return decode_with_format(data, limits=limits)[0]


def decode_with_format(data: bytes, *, limits: DecodeLimits = _DEFAULT_LIMITS) -> tuple[Image.Image, ImageFormat]:
    """Like `decode_image`, and says which format the bytes are in, whatever the file was called."""
    with _without_pillow_warnings():
        image, image_format = _open(data, limits)
        return _decoded(image), image_format


def cropped(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The part of the box (left, top, right, bottom) that lies in the picture; Pillow alone would paint the rest black.

    Raises:
        DecodeError: no part of it does.
    """
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height)
    if left >= right or top >= bottom:
        raise DecodeError("absurd_size", f"the box {box} is outside the picture of {image.width} x {image.height}")
    return image.crop((left, top, right, bottom))


class CroppablePicture:
    """A picture that is decoded only as finely as a crop of it needs."""

    size: tuple[int, int]  # width and height once upright, in pixels

    def __init__(self, data: bytes, *, limits: DecodeLimits = _DEFAULT_LIMITS) -> None:
        """Reads a JPEG's header, and decodes any other picture.

        Raises:
            DecodeError: see `decode_image`.
        """
        with _without_pillow_warnings():
            image, image_format = _open(data, limits)
            self._data, self._limits = data, limits
            self._whole: Image.Image | None = None
            if image_format == "JPEG":
                orientation = _orientation(image)
                self._is_plain = image.mode == "RGB" and orientation == 1 and "icc_profile" not in image.info
                self.size = image.size[::-1] if orientation in _ORIENTATIONS_ON_THE_SIDE else image.size
            else:
                self._whole = _decoded(image)
                self.size = self._whole.size

    def decode_crop(self, box: tuple[int, int, int, int], *, at_least: int) -> UInt8[ndarray, "height width 3"]:
        """The pixels of a box (left, top, right, bottom), shrunk on the way where that saves work.

        A JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as both sides of the box keep `at_least` pixels, each
        the average of those it stands for. With or without the extra `fast`, the pixels are the same.

        Raises:
            DecodeError: see `decode_image`.
        """
        if self._whole is not None:
            return np.array(self._whole.crop(box))
        left, top, right, bottom = box
        side = min(right - left, bottom - top)
        divisor = next((divisor for divisor in (8, 4, 2) if side >= divisor * at_least), 1)
        # Pixels that the box has a part of only are taken whole.
        rows = slice(top // divisor, -(-bottom // divisor))
        columns = slice(left // divisor, -(-right // divisor))
        return self._decode_reduced(divisor)[rows, columns]

    def _decode_reduced(self, divisor: int) -> UInt8[ndarray, "height width 3"]:
        if self._is_plain:
            pixels = fast_jpeg.decode(self._data, self.size, divisor=divisor)
            if pixels is not None:
                return pixels
        with _without_pillow_warnings():
            image, _ = _open(self._data, self._limits)
            image.draft(None, (image.width // divisor, image.height // divisor))
            return np.array(_decoded(image))


def _open(data: bytes, limits: DecodeLimits) -> tuple[Image.Image, ImageFormat]:
    """Parses the header only."""
    if not data:
        raise DecodeError("empty", "the picture has no bytes")
    if len(data) > limits.max_bytes:
        raise DecodeError("absurd_size", f"the picture has {len(data)} bytes, {limits.max_bytes} are allowed")
    announced = _announced_format(data)
    if announced is None or announced not in limits.formats:
        raise _not_accepted(data, limits)
    try:
        image = Image.open(BytesIO(data), formats=[announced])
    except Image.DecompressionBombError as error:
        raise DecodeError("too_many_pixels", _text_of(error)) from error
    except Exception as error:
        message = f"the picture starts as {announced}, but ends early or is damaged: {_text_of(error)}"
        raise DecodeError("truncated", message) from error
    _check_size(image, limits)
    return image, announced


def _announced_format(data: bytes) -> ImageFormat | None:
    """The allowed format that the first bytes promise: one parser sees the data, not six."""
    for image_format, starts in _FIRST_BYTES.items():
        if data.startswith(starts) and (image_format != "WEBP" or data[8:12] == b"WEBP"):
            return image_format
    return None


def _check_size(image: Image.Image, limits: DecodeLimits) -> None:
    width, height = image.size
    if max(width, height) > limits.max_side or min(width, height) < limits.min_side:
        allowed = f"{limits.min_side} to {limits.max_side} pixels a side are allowed"
        raise DecodeError("absurd_size", f"the picture is {width} x {height}, {allowed}")
    if width * height > limits.max_pixels:
        raise DecodeError("too_many_pixels", f"the picture is {width} x {height}, {limits.max_pixels} are allowed")


def _not_accepted(data: bytes, limits: DecodeLimits) -> DecodeError:
    """Tells a known format that is not allowed from bytes that are no picture at all."""
    try:
        found = Image.open(BytesIO(data)).format
    except Exception:
        return DecodeError("not_an_image", "the bytes are no picture in a known format")
    return DecodeError("format_not_allowed", f"the picture is {found}; allowed are {', '.join(limits.formats)}")


def _decoded(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _as_rgb(_upright(image))
    except DecodeError:
        raise
    except Exception as error:
        # Pillow's codecs raise anything from OSError to struct.error on damaged data.
        raise DecodeError("truncated", f"the picture ends early or is damaged: {_text_of(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    transpose = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
    return image if transpose is None else image.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # Damaged metadata around a whole picture: viewers show it as it lies.
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        return _from_sixteen_bits(image).convert("RGB")
    if image.mode == "F":
        raise _without_range()
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        picture = _as_srgb(image.convert("RGBA"), profile)
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    try:
        return _as_srgb(image, profile).convert("RGB")
    except ValueError:
        raise DecodeError("format_not_allowed", f"pixels of kind {image.mode} cannot be shown as RGB") from None


def _as_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Follows an embedded colour profile, as viewers do; one that is damaged or of other colours counts for nothing."""
    transform = _to_srgb(profile, image.mode) if profile else None
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target_mode = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target_mode)
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
        return None


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise _without_range()
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _without_range() -> DecodeError:
    return DecodeError("format_not_allowed", "32-bit pixels have no agreed range that could be shown as RGB")


class _PillowWarnings:
    """How many decoders run now; the filter is set by the first and reset by the last, so threads do not undo it."""

    lock = threading.Lock()
    num_decoders = 0
    filters = warnings.catch_warnings()


@contextmanager
def _without_pillow_warnings() -> Iterator[None]:
    """Pillow warns about damaged metadata and large pictures; what matters of that is a DecodeError here."""
    state = _PillowWarnings
    with state.lock:
        if state.num_decoders == 0:
            state.filters = warnings.catch_warnings()
            state.filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        state.num_decoders += 1
    try:
        yield
    finally:
        with state.lock:
            state.num_decoders -= 1
            if state.num_decoders == 0:
                state.filters.__exit__(None, None, None)


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__
