"""Requests that mean ill, or that something went wrong with on the way: number -> request, always the same.

What a fixed case must end in is part of it. Mutated ones may end in anything but a failure of the server.
"""

import base64
import functools
import io
import json
import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.unit.serving.small_index import draw

FINE = "fine"
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class HostileRequest:
    """For `client.request(method, path, **how)`."""

    story: str
    method: str
    path: str
    how: dict[str, Any] = field(repr=False)
    endings: frozenset[str] = frozenset()  # the codes, or FINE, one of which it must have; empty: any


def hostile_request(number: int) -> HostileRequest:
    """First every known picture, to search with and then to add; after them anything."""
    source = random.Random(number)
    known = _known_uploads()
    if number < 2 * len(known):
        story, data, endings = known[number % len(known)]
        path = "/v1/search" if number < len(known) else "/v1/items"
        return _upload(source, path, story, data, frozenset(endings.split()))
    kinds = [_mutated_upload, _mutated_upload, _mutated_json, _mutated_form, _odd_json, _odd_address]
    return source.choice(kinds)(source)


@functools.cache
def _known_uploads() -> list[tuple[str, bytes, str]]:
    """Story, bytes, and the codes that it may end in."""
    picture = draw("ring", "teal")
    many_lines = zlib.compress(bytes(30_000_000), 9)
    huge = _png(60_000, 60_000, b"")
    return [
        ("no bytes", b"", "image.empty"),
        ("one byte", b"\xff", "image.not_an_image"),
        *((f"{name}, its first bytes only", data[:12], "image.truncated") for name, data in _pictures().items()),
        *((f"{name}, whole", data, FINE) for name, data in _pictures().items()),
        ("a PNG of 3.6 billion pixels", huge, "image.too_many_pixels"),
        ("a PNG of 400 million pixels", _png(20_000, 20_000, many_lines), "image.too_many_pixels"),
        ("a PNG of one line of a billion pixels", _png(1_000_000_000, 1, b""), "image.too_many_pixels"),
        ("a PNG of one long line", _png(40_000, 1, b""), "image.absurd_size"),
        ("a PNG of no pixels", _png(0, 0, b""), "image.truncated image.absurd_size"),
        ("a PNG that holds less than it says", _png(5_000, 5_000, zlib.compress(b"\0" * 99)), "image.truncated"),
        ("a PNG that holds a thousand times what it says", _png(8, 8, many_lines), f"{FINE} image.truncated"),
        (
            "a PNG with a text that swells",
            _png(8, 8, _lines(8, 8), (b"zTXt", b"a\0\0" + many_lines)),
            f"{FINE} image.truncated",
        ),
        (
            "a PNG with a profile that swells",
            _png(8, 8, _lines(8, 8), (b"iCCP", b"a\0\0" + many_lines)),
            f"{FINE} image.truncated",
        ),
        ("a JPEG of 4 billion pixels", _resized_jpeg(65_500, 65_500), "image.too_many_pixels"),
        ("a JPEG of 400 million pixels", _resized_jpeg(20_000, 20_000), "image.too_many_pixels"),
        (
            "a GIF of 4 billion pixels",
            b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(64),
            "image.absurd_size image.truncated",
        ),
        ("a BMP of 900 million pixels", _resized_bmp(30_000, 30_000), "image.too_many_pixels"),
        ("a BMP of two billion lines", _resized_bmp(9, -(2**31)), "image.too_many_pixels"),
        (
            "floats in a TIFF",
            _saved(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"),
            "image.format_not_allowed",
        ),
        ("an icon", _saved(picture, "ICO"), "image.format_not_allowed"),
        ("a PPM", _saved(picture, "PPM"), "image.format_not_allowed"),
        ("a PDF", _saved(picture, "PDF"), "image.not_an_image"),
        (
            "PostScript",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(rm -rf /) run\n",
            "image.format_not_allowed image.not_an_image",
        ),
        (
            "an SVG with an entity",
            b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
            "image.not_an_image",
        ),
        ("HTML that goes on as a JPEG", b"<script>alert(1)</script>" + _pictures()["JPEG"], "image.not_an_image"),
        ("a GIF that is a script", b"GIF89a/*" + bytes(40) + b"*/=1;alert(1)", "image.absurd_size image.truncated"),
        *((f"{name} that goes on as a ZIP", data + b"PK\3\4" + bytes(99), FINE) for name, data in _pictures().items()),
    ]


@functools.cache
def _pictures() -> dict[str, bytes]:
    """One of every kind that cameras, phones, scanners and designers make."""
    picture = draw("ring", "teal")
    other = draw("disc", "gold")
    deep = np.linspace(0, 65_535, 96 * 96).reshape(96, 96).astype(np.uint16)
    see_through = picture.convert("RGBA")
    see_through.putalpha(128)
    pictures = {
        "JPEG": _saved(picture, "JPEG"),
        "progressive JPEG": _saved(picture, "JPEG", progressive=True),
        "grey JPEG": _saved(picture.convert("L"), "JPEG"),
        "CMYK JPEG": _saved(picture.convert("CMYK"), "JPEG"),
        "PNG": _saved(picture, "PNG"),
        "see-through PNG": _saved(see_through, "PNG"),
        "16-bit PNG": _saved(Image.fromarray(deep), "PNG"),
        "palette PNG": _saved(picture.quantize(16), "PNG", transparency=0),
        "1-bit PNG": _saved(picture.convert("1"), "PNG"),
        "animated PNG": _saved(picture, "PNG", save_all=True, append_images=[other] * 3),
        "GIF": _saved(picture, "GIF"),
        "animated GIF": _saved(picture, "GIF", save_all=True, append_images=[other] * 3, loop=0),
        "WebP": _saved(picture, "WEBP"),
        "lossless WebP": _saved(see_through, "WEBP", lossless=True),
        "animated WebP": _saved(picture, "WEBP", save_all=True, append_images=[other] * 3),
        "BMP": _saved(picture, "BMP"),
        "TIFF": _saved(picture, "TIFF"),
        "CMYK TIFF": _saved(picture.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "16-bit TIFF": _saved(Image.fromarray(deep), "TIFF"),
        "TIFF of several pages": _saved(picture, "TIFF", save_all=True, append_images=[other] * 3),
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = orientation
        pictures[f"JPEG turned by EXIF {orientation}"] = _saved(picture, "JPEG", exif=exif)
    return pictures


def upright_and_turned() -> list[tuple[bytes, bytes]]:
    """Pairs of the same picture: turned by its pixels, and by its EXIF. Lossless, so that they give the same pixels."""
    picture = draw("triangle", "tomato").crop((0, 0, 90, 60))
    by_pixels = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    pairs = []
    for orientation, transpose in by_pixels.items():
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = orientation
        pairs.append((_saved(picture.transpose(transpose), "PNG"), _saved(picture, "PNG", exif=exif)))
    return pairs


def _mutated_upload(source: random.Random) -> HostileRequest:
    name = source.choice(list(_pictures()))
    data, how = _mutated(_pictures()[name], source)
    return _upload(source, source.choice(["/v1/search", "/v1/search", "/v1/items"]), f"{name}, {how}", data)


def _mutated(data: bytes, source: random.Random) -> tuple[bytes, str]:
    changed = bytearray(data)
    match source.randrange(6):
        case 0:
            return data[: source.randrange(len(data))], "cut off"
        case 1:
            for _ in range(source.choice([1, 4, 40])):
                changed[source.randrange(len(data))] = source.randrange(256)
            return bytes(changed), "with other bytes"
        case 2:
            # Sizes, lengths and offsets are in the first bytes.
            for _ in range(source.choice([1, 3])):
                changed[source.randrange(min(len(data), 200))] ^= 1 << source.randrange(8)
            return bytes(changed), "with other bits in its header"
        case 3:
            start = source.randrange(len(data))
            del changed[start : start + source.choice([1, 50, 1000])]
            return bytes(changed), "with a hole"
        case 4:
            start = source.randrange(len(data))
            changed[start:start] = data[start : start + 500] * source.choice([1, 50])
            return bytes(changed), "with a part repeated"
        case _:
            other = source.choice(list(_pictures().values()))
            return data[: source.randrange(len(data))] + other[source.randrange(len(other)) :], "going on as another"


def _upload(
    source: random.Random, path: str, story: str, data: bytes, endings: frozenset[str] = frozenset()
) -> HostileRequest:
    fields: dict[str, Any] = {"k": "5"} if path == "/v1/search" else {"metadata": "{}"}
    if source.random() < 0.5:
        name = source.choice(["a.jpg", "../../etc/passwd", "a.php\0.png", "\r\nX-Evil: 1", "ä" * 300])
        kind = source.choice(["image/jpeg", "text/html", "nonsense", "image/png; a=b"])
        how: dict[str, Any] = {"files": {"image": (name, data, kind)}, "data": fields}
    else:
        encoded = base64.b64encode(data).decode()
        how = {"json": {"image": encoded, **{name: json.loads(text) for name, text in fields.items()}}}
    return HostileRequest(f"{story}, {next(iter(how))} to {path}", "POST", path, how, endings)


_JSON = {"content-type": "application/json"}
_ODD_VALUES: list[str] = [
    *("null", "true", '""', "0", "-1", "1.5", "[]", "{}", "[[]]", '{"a": {}}', "NaN", "Infinity", "-Infinity", "1e999"),
    *("1" * 400, "-" + "9" * 19, "9223372036854775807", "9223372036854775808", "1e-400", "0.1e1", "[1, 2, 3, 4]"),
    *('"\\ud800"', '"\\u0000"', '"' + "x" * 100_000 + '"', '"../../etc/passwd"', '"\'; DROP TABLE items; --"'),
    *("[" * 200 + "]" * 200, "[" * 5_000 + "]" * 5_000, '{"a":' * 200 + "1" + "}" * 200, "[" + "0," * 20_000 + "0]"),
    *(
        '{"column": "key", "equals": null}',
        '{"column": "width", "in": []}',
        '{"all": []}',
        '{"any": []}',
        '{"not": {}}',
    ),
    *('{"column": "width", "above": 1e999}', '{"column": "key", "in": [1, "a", null]}', '{"column": "", "equals": 1}'),
    *('{"name": "diffusion", "shortlist": 1e9}', '{"name": "k_reciprocal", "num_neighbours": 0}', '"diffusion"'),
    *(json.dumps([0.1] * 512), json.dumps([1e308] * 512), json.dumps([0] * 512), "[" + "NaN," * 511 + "NaN]"),
]
_FIELDS = [
    "image",
    "id",
    "vector",
    "roi",
    "k",
    "exact",
    "recall",
    "filter",
    "rerank",
    "include_self",
    "version",
    "__class__",
    "",
]


def _odd_json(source: random.Random) -> HostileRequest:
    """Well-formed for the most part, with values that fields do not expect."""
    fields = [("id", str(source.randrange(30)))] if source.random() < 0.6 else []
    fields += [(source.choice(_FIELDS), source.choice(_ODD_VALUES)) for _ in range(source.randrange(1, 4))]
    body = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"
    return HostileRequest(f"JSON {body[:200]}", "POST", "/v1/search", {"content": body.encode(), "headers": _JSON})


def _mutated_json(source: random.Random) -> HostileRequest:
    whole = json.dumps(
        {"id": 3, "k": 7, "filter": {"column": "class_name", "in": ["disc", "ring"]}, "rerank": "diffusion"}
    )
    body, how = _mutated(whole.encode(), source)
    kind = source.choice([b"application/json", b"application/json; charset=utf-16", b"APPLICATION/JSON", b"text/json"])
    headers = {"content-type": kind, "content-encoding": source.choice(["identity", "gzip", "br"])}
    return HostileRequest(f"JSON {how}", "POST", "/v1/search", {"content": body, "headers": headers})


def _mutated_form(source: random.Random) -> HostileRequest:
    picture = _pictures()[source.choice(list(_pictures()))]
    disposition = b'Content-Disposition: form-data; name="%s"'
    parts = [disposition % b"k" + b"\r\n\r\n5", disposition % b"image" + b'; filename="a"\r\n\r\n' + picture]
    match source.randrange(5):
        case 0:
            parts *= source.choice([2, 50])
        case 1:
            parts.insert(0, b"X-Header: " + b"y" * source.choice([10, 100_000]) + b"\r\n\r\nz")
        case 2:
            parts.append(
                disposition % source.choice([b"", b"\xff\xfe", b"image", b"_charset_", b'a"; name="b']) + b"\r\n\r\n1"
            )
        case 3:
            parts.append(b"Content-Transfer-Encoding: base64\r\n" + disposition % b"roi" + b"\r\n\r\nMSwyLDMsNA==")
        case _:
            parts.append(
                disposition % b"roi" + b"\r\n\r\n" + source.choice([b"1,2,3", b"\xff", b"nan,0,1,1", b"0,0,1e400,5"])
            )
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + source.choice(
        [b"--b--\r\n", b"", b"--b", b"--c--"]
    )
    if source.random() < 0.4:
        body, _ = _mutated(body, source)
    kind = source.choice(
        ["multipart/form-data; boundary=b"] * 6 + ["multipart/form-data", "multipart/mixed; boundary=b"]
    )
    if source.random() < 0.1:
        kind = "multipart/form-data; boundary=" + source.choice(["", '"', "b" * 5_000, "é", "b; boundary=c", "--b"])
    how = {"content": body, "headers": {"content-type": kind.encode("latin-1")}}
    return HostileRequest(f"a form, {kind[:60]}", "POST", "/v1/search", how)


def _odd_address(source: random.Random) -> HostileRequest:
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get", "X" * 50]
    texts = [
        "0",
        "-1",
        "9" * 30,
        "1e3",
        "abc",
        "%00",
        "%ff%fe",
        "..%2f..%2fetc%2fpasswd",
        "\u0661",
        " 1",
        "1 OR 1=1",
        "x" * 5_000,
    ]
    paths = [
        "/v1/items/{}",
        "/v1/items/{}/image",
        "/v1/items?sample={}",
        "/v1/items?seed={}",
        "/v1/items/3/image?picture={}",
    ]
    paths += [
        "/{}",
        "/v1/{}",
        "/page/{}",
        "/v1/info?{}",
        "/v1/search?k={}",
        "//{}",
        "/v1/items/{}/image/..",
        "/v1/../{}",
    ]
    path = source.choice(paths).format(source.choice(texts))
    headers = {
        "X-Request-ID": source.choice([b"fine", b"\xff" * 20, b"a b", b"x" * 2_000]),
        "If-None-Match": source.choice([b"*", b'"', b'W/"1"', b"x" * 2_000]),
        "Range": source.choice([b"bytes=0-", b"bytes=5-1", b"bytes=" + b"0-1," * 500]),
        "Accept": source.choice([b"*/*", b"nothing", b"application/xml"]),
        "Authorization": source.choice([b"Bearer", b"Bearer \xff", b"Basic Og==", b"Bearer " + b"x" * 2_000]),
        "Origin": source.choice([b"null", b"https://evil.example", b"http://localhost\xff", b"x" * 2_000]),
    }
    chosen = dict(source.sample(sorted(headers.items()), 2))
    method = source.choice(methods)
    return HostileRequest(f"{method} {path[:80]}", method, path, {"headers": chosen})


def _saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()


def _lines(width: int, height: int) -> bytes:
    return zlib.compress((b"\0" + bytes(3 * width)) * height)


def _png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in whole
    )


def _resized_jpeg(width: int, height: int) -> bytes:
    data = _pictures()["JPEG"]
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def _resized_bmp(width: int, height: int) -> bytes:
    data = _pictures()["BMP"]
    return data[:18] + struct.pack("<ii", width, height) + data[26:]
