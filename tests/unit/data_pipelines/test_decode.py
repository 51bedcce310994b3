"""Every kind of picture becomes the RGB that a viewer shows; every bad one a DecodeError with its reason."""

import importlib.util
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipelines.decode import CroppablePicture, DecodeLimits, decode_image, decode_with_format
from lookalike.errors import DecodeError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def three_colours(mode: str = "RGB") -> Image.Image:
    """Wider than high: red on the left, green in the middle, blue on the right; blocks that JPEG keeps apart."""
    image = Image.new("RGB", (48, 16))
    for index, colour in enumerate((RED, GREEN, BLUE)):
        image.paste(colour, (16 * index, 0, 16 * index + 16, 16))
    return image.convert(mode)


def assert_shows_three_colours(image: Image.Image, *, tolerance: int = 3) -> None:
    assert image.mode == "RGB"
    assert image.size == (48, 16)
    for index, colour in enumerate((RED, GREEN, BLUE)):
        assert np.abs(np.subtract(image.getpixel((16 * index + 8, 8)), colour)).max() <= tolerance


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ],
)
def test_every_allowed_format_decodes_to_rgb(image_format, options):
    image, found = decode_with_format(encoded(three_colours(), image_format, **options))
    # Chroma of lossy WebP is subsampled.
    assert_shows_three_colours(image, tolerance=16 if image_format == "WEBP" else 3)
    assert found == image_format


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, image_format):
    upright = three_colours()
    # How a camera would have stored the upright picture, so that showing it undoes the turn.
    stored = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(image_format, {})
    assert_shows_three_colours(decode_image(encoded(stored, image_format, exif=exif, **options)))


def test_damaged_exif_leaves_the_picture_as_it_lies():
    data = encoded(three_colours(), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert_shows_three_colours(decode_image(data))


def test_cmyk_becomes_rgb():
    data = encoded(three_colours("CMYK"), "JPEG", quality=95, subsampling=0)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert_shows_three_colours(decode_image(data))


def test_palette_and_bilevel_become_rgb():
    assert_shows_three_colours(decode_image(encoded(three_colours().quantize(3))))
    bilevel = decode_image(encoded(Image.new("1", (4, 4), 1)))
    assert bilevel.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65_535, 256).round().astype(np.uint16)[None, :].repeat(2, axis=0)
    for image_format in ("PNG", "TIFF"):
        image = decode_image(encoded(Image.fromarray(ramp), image_format))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image)[0, :, 0], np.arange(256))


def test_sixteen_bit_colour_is_scaled():
    """Pillow writes no 16-bit RGB, so the PNG is put together by hand: one pixel of (65535, 32896, 0)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 65_535, 32_896, 0)))
    data = b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")
    assert decode_image(data).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    decoded = decode_image(encoded(image.convert(mode)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_half_transparent_is_blended_with_white():
    assert decode_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_shown(image_format):
    others = [Image.new("RGB", (48, 16), "black")] * 2
    options = {"lossless": True} if image_format == "WEBP" else {}
    assert_shows_three_colours(
        decode_image(encoded(three_colours(), image_format, save_all=True, append_images=others, **options))
    )


JPEG = encoded(three_colours(), "JPEG")


def png_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 1000, "not_an_image"),
        (b"<!doctype html><p>404 not found", "not_an_image"),
        (b"RIFF\0\0\0\0WAVE" + b"\0" * 100, "not_an_image"),
        (b"\xff\xd8\xff", "truncated"),
        (JPEG[:20], "truncated"),
        (JPEG[:-40], "truncated"),
        (encoded(three_colours())[:-30], "truncated"),
        (encoded(three_colours(), "GIF")[:-10], "truncated"),
        (encoded(three_colours(), "WEBP")[:-10], "truncated"),
        (encoded(three_colours(), "BMP")[:-10], "truncated"),
        (encoded(three_colours(), "TIFF", compression="tiff_lzw")[:200], "truncated"),
        (png_claiming(9_000, 9_000), "too_many_pixels"),
        (png_claiming(20_000, 20_000), "too_many_pixels"),
        (png_claiming(100_000, 1), "absurd_size"),
        (encoded(three_colours(), "PPM"), "format_not_allowed"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "format_not_allowed"),
        (encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "format_not_allowed"),
    ],
)
def test_bad_pictures_say_why(data, reason):
    with pytest.raises(DecodeError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (DecodeLimits(max_pixels=48 * 16 - 1), "too_many_pixels"),
        (DecodeLimits(max_side=47), "absurd_size"),
        (DecodeLimits(min_side=17), "absurd_size"),
        (DecodeLimits(max_bytes=100), "absurd_size"),
        (DecodeLimits(formats=("PNG",)), "format_not_allowed"),
    ],
)
def test_limits_refuse_a_whole_picture(limits, reason):
    with pytest.raises(DecodeError) as caught:
        decode_image(JPEG, limits=limits)
    assert caught.value.reason == reason
    decode_image(JPEG, limits=DecodeLimits(max_pixels=48 * 16, max_side=48, min_side=16, formats=("JPEG",)))


def test_no_cut_and_no_flipped_byte_raises_anything_else():
    random = np.random.default_rng(0)
    originals = [encoded(three_colours(), name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]
    for original in originals:
        for _ in range(150):
            damaged = bytearray(original[: random.integers(1, len(original) + 1)])
            for position in random.integers(0, len(damaged), 3):
                damaged[position] = random.integers(256)
            try:
                decode_image(bytes(damaged))
            except DecodeError:
                continue


def test_threads_do_not_undo_each_others_warning_filter():
    """A picture that Pillow warns about, in many threads at once, under `error` for every warning."""
    data = encoded(three_colours(), "TIFF", compression="tiff_lzw")[:-30]
    failures = []

    def decode() -> None:
        for _ in range(50):
            try:
                decode_image(data)
            except DecodeError:
                continue
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def wide_gamut_profile() -> bytes:
    """sRGB's curve with red and green swapped: nobody could miss whether it was followed."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    num_tags = struct.unpack_from(">I", profile, 128)[0]
    entries = {bytes(profile[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(num_tags)}
    profile[entries[b"rXYZ"] : entries[b"rXYZ"] + 4], profile[entries[b"gXYZ"] : entries[b"gXYZ"] + 4] = (
        b"gXYZ",
        b"rXYZ",
    )
    description = entries[b"desc"]
    offset, size = struct.unpack_from(">II", profile, description + 4)
    profile[offset : offset + size] = bytes(profile[offset : offset + size]).replace(
        "sRGB".encode("utf-16-be"), "none".encode("utf-16-be")
    )
    return bytes(profile)


def swapped() -> Image.Image:
    red, green, blue = three_colours().split()
    return Image.merge("RGB", (green, red, blue))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_an_embedded_colour_profile_is_followed(mode, image_format):
    data = encoded(swapped().convert(mode), image_format, icc_profile=wide_gamut_profile())
    assert_shows_three_colours(decode_image(data))


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_a_profile_of_no_use_is_ignored(profile, image_format):
    data = encoded(
        three_colours(),
        image_format,
        icc_profile=profile,
        **{"quality": 95, "subsampling": 0} if image_format == "JPEG" else {},
    )
    assert_shows_three_colours(decode_image(data))


def noisy(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr("data_pipelines.fast_jpeg.decode", lambda *_, **__: None)
    elif importlib.util.find_spec("simplejpeg") is None:
        pytest.skip("simplejpeg is not installed")


JPEGS = {
    "plain": {},
    "progressive": {"progressive": True},
    "full_chroma": {"subsampling": 0},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "on_its_side": {"orientation": 6},
    "upside_down": {"orientation": 3},
    "profile": {"icc_profile": wide_gamut_profile()},
}


def jpeg(width: int, height: int, *, mode: str = "RGB", orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noisy(width, height, mode), "JPEG", exif=exif, quality=90, **options)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.usefixtures("decoder")
def test_a_crop_at_full_size_is_cut_from_the_picture(kind):
    data = jpeg(203, 151, **JPEGS[kind])
    picture, whole = CroppablePicture(data), decode_image(data)
    assert picture.size == whole.size
    for box in ((0, 0, *whole.size), (10, 20, 90, 130)):
        np.testing.assert_array_equal(picture.decode_crop(box, at_least=80), np.asarray(whole.crop(box)))


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize(("at_least", "divisor"), [(52, 1), (51, 2), (26, 2), (25, 4), (12, 8), (1, 8)])
@pytest.mark.usefixtures("decoder")
def test_a_crop_is_shrunk_as_far_as_is_asked_for(kind, at_least, divisor):
    data = jpeg(203, 151, **JPEGS[kind])
    box = (40, 24, 144, 126)  # 104 x 102
    pixels = CroppablePicture(data).decode_crop(box, at_least=at_least)
    expected = np.asarray(decode_image(data).crop(box).reduce(divisor)).astype(int)
    assert abs(pixels.shape[0] - 102 / divisor) <= 1
    assert abs(pixels.shape[1] - 104 / divisor) <= 1
    height, width = min(pixels.shape[0], expected.shape[0]), min(pixels.shape[1], expected.shape[1])
    # Box edges are moved to those of shrunk pixels, so contents may lie one of them apart.
    assert np.abs(pixels[:height, :width] - expected[:height, :width]).mean() < 12


@pytest.mark.skipif(importlib.util.find_spec("simplejpeg") is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("size", [(203, 151), (64, 64), (9, 500), (1, 1)])
@pytest.mark.parametrize("at_least", [500, 60, 30, 15, 1])
def test_both_decoders_give_the_same_pixels(monkeypatch, size, at_least):
    data = jpeg(*size)
    fast = CroppablePicture(data).decode_crop((0, 0, *size), at_least=at_least)
    monkeypatch.setattr("data_pipelines.fast_jpeg.decode", lambda *_, **__: None)
    np.testing.assert_array_equal(fast, CroppablePicture(data).decode_crop((0, 0, *size), at_least=at_least))


@pytest.mark.usefixtures("decoder")
def test_a_crop_of_a_cut_picture_is_a_decode_error():
    data = jpeg(203, 151)
    with pytest.raises(DecodeError) as caught:
        CroppablePicture(data[: len(data) // 2]).decode_crop((0, 0, 100, 100), at_least=10)
    assert caught.value.reason == "truncated"


def test_a_picture_that_is_no_jpeg_is_cropped_exactly():
    image = noisy(60, 40)
    picture = CroppablePicture(encoded(image))
    assert picture.size == (60, 40)
    np.testing.assert_array_equal(
        picture.decode_crop((8, 4, 56, 36), at_least=2), np.asarray(image.crop((8, 4, 56, 36)))
    )
