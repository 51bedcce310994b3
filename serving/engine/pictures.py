"""The pictures behind ids: originals from the shards or from the journal, and thumbnails of them."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.decode import ANY_PICTURE, CroppablePicture
from indexing.living.journal import Journal, StoredPicture
from serving.engine.errors import PicturesUnavailableError
from serving.engine.queries import PictureFile
from serving.engine.served_index import Served

# Types that a browser never runs as documents; keyed by the extensions in the sample table.
_MEDIA_TYPES = {
    "bmp": "image/bmp",
    "gif": "image/gif",
    "jpg": "image/jpeg",
    "png": "image/png",
    "tif": "image/tiff",
    "webp": "image/webp",
}
_FIRST_BYTES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II": "image/tiff",
    b"MM": "image/tiff",
}
_UNKNOWN_TYPE = "application/octet-stream"
_THUMBNAIL_QUALITY = 82
_TAG_LENGTH = 12
ADDED_TAG = "added"
# What an id of the shards is left with that was given a vector alone: their picture is not that of the vector.
NO_PICTURE = StoredPicture()


class Pictures:
    """Safe to use from many threads."""

    def __init__(self, journal: Journal, *, cache_bytes: int) -> None:
        """
        Args:
            cache_bytes: Memory for thumbnails.
        """
        self._journal = journal
        self._thumbnails = ThumbnailCache(cache_bytes)

    def tags(self, served: Served, ids: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """For each id, what differs where the picture behind it does; None where there is none.

        Args:
            rows: The metadata of the ids.
        """
        if served.shown_by is not None:
            return self._tags_elsewhere(served.shown_by, ids, rows)
        of_shards = _tag_of_shards(served)
        has_changes = served.view.sequence > 0
        tags = [
            of_shards if _is_in_shards(served, i, row, has_changes=has_changes) else None
            for i, row in zip(ids, rows, strict=True)
        ]
        if has_changes:
            of_added = self._tags_of_added(served, ids)
            tags = [of_added.get(i, tag) for i, tag in zip(ids, tags, strict=True)]
        return tags

    def _tags_elsewhere(
        self, serving: Served, ids: Sequence[int], rows: Sequence[Mapping[str, Any]]
    ) -> list[str | None]:
        """As `serving` shows the pictures; none of what has another key there."""
        is_held = serving.view.holds(np.array(ids, np.int64))
        held = np.array(ids, np.int64)[is_held]
        there = dict(zip(held.tolist(), serving.view.metadata_of(held), strict=True))
        same = [i for i, row in zip(ids, rows, strict=True) if i in there and there[i].get("key") == row.get("key")]
        tags = dict(zip(same, self.tags(serving, same, [there[i] for i in same]), strict=True))
        return [tags.get(i) for i in ids]

    def _tags_of_added(self, served: Served, ids: Sequence[int]) -> dict[int, str | None]:
        """Of those of `ids` for which the journal has a picture, or says that there is none."""
        stored = self._journal.with_pictures(ids)
        tags: dict[int, str | None] = dict.fromkeys(stored)
        may_lack = stored & {i for i in ids if may_have_been_of_shards(served, i)}
        shown = sorted(stored - {i for i in may_lack if self._journal.picture_of(i) == NO_PICTURE})
        if shown:
            # Another picture has another vector, and that is at hand: the pictures of all hits would take long to read.
            vectors = served.view.vectors_of(np.array(shown, np.int64))
            tags |= {i: f"{ADDED_TAG}-{_digest(v.tobytes())}" for i, v in zip(shown, vectors, strict=True)}
        return tags

    def original(self, served: Served, identifier: int, row: Mapping[str, Any]) -> PictureFile:
        """The bytes as they were added.

        Args:
            row: The metadata of the id.

        Raises:
            PicturesUnavailableError: no picture is at hand.
        """
        has_changes = served.view.sequence > 0
        stored = self._journal.picture_of(identifier) if has_changes else None
        if stored is not None and stored.content is not None:
            return PictureFile(stored.content, media_type_of(stored.content), f"{ADDED_TAG}-{_digest(stored.content)}")
        shards = served.shards
        is_in_shards = stored != NO_PICTURE and _is_in_shards(served, identifier, row, has_changes=has_changes)
        if shards is None or not is_in_shards:
            raise PicturesUnavailableError(
                "this server has no shards to read pictures from"
                if shards is None and stored is None and may_have_been_of_shards(served, identifier)
                else f"no picture was stored with id {identifier}: it is a vector alone"
            )
        extension = shards.samples["extension"][identifier].as_py()
        tag = f"{_tag_of_shards(served)}-{identifier}"
        return PictureFile(shards.read_bytes(identifier), _MEDIA_TYPES.get(extension, _UNKNOWN_TYPE), tag)

    def thumbnail(self, served: Served, identifier: int, row: Mapping[str, Any], *, side: int) -> PictureFile:
        """A JPEG that fits into a square of `side` pixels; never larger than the original.

        Raises:
            PicturesUnavailableError: no picture is at hand.
            DecodeError: it cannot be decoded.
        """
        original = self.original(served, identifier, row)
        tag = f"{original.tag}-{side}"
        found = self._thumbnails.get(tag)
        if found is None:
            found = _thumbnail(original.data, side)
            self._thumbnails.put(tag, found)
        return PictureFile(found, "image/jpeg", tag)


class ThumbnailCache:
    """The last used ones, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, bytes] = OrderedDict()
        self.num_bytes = 0

    def get(self, tag: str) -> bytes | None:
        with self._lock:
            found = self._entries.get(tag)
            if found is not None:
                self._entries.move_to_end(tag)
            return found

    def put(self, tag: str, data: bytes) -> None:
        with self._lock:
            self.num_bytes += len(data) - len(self._entries.pop(tag, b""))
            self._entries[tag] = data
            while self.num_bytes > self._max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.num_bytes -= len(oldest)


def media_type_of(data: bytes) -> str:
    """By the first bytes: whatever a file was called, a browser is told what it is."""
    return next((kind for start, kind in _FIRST_BYTES.items() if data.startswith(start)), _UNKNOWN_TYPE)


def may_have_been_of_shards(served: Served, identifier: int) -> bool:
    """Whether the index came with a picture of this number."""
    if "shards" not in served.view.base.manifest.locations:
        return False
    return served.shards is None or identifier < served.shards.num_samples


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of a picture of the gallery once upright, in pixels; reads a JPEG's header alone."""
    return CroppablePicture(data, limits=ANY_PICTURE).size


def _thumbnail(data: bytes, side: int) -> bytes:
    picture = CroppablePicture(data, limits=ANY_PICTURE)
    # A JPEG is decoded at a fraction of its size, as long as its shorter side has enough pixels left.
    shorter = max(1, round(side * min(picture.size) / max(picture.size)))
    image = Image.fromarray(picture.decode_crop((0, 0, *picture.size), at_least=shorter))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_THUMBNAIL_QUALITY)
    return file.getvalue()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_TAG_LENGTH).hexdigest()


def _tag_of_shards(served: Served) -> str | None:
    return None if served.shards is None else served.shards.fingerprint[:_TAG_LENGTH]


def _is_in_shards(served: Served, identifier: int, row: Mapping[str, Any], *, has_changes: bool) -> bool:
    """Whether the shards' picture of this number is the one that the id stands for.

    An id may have been deleted, and given to something else since: then that has another key.
    """
    shards = served.shards
    if shards is None or identifier >= shards.num_samples:
        return False
    return not has_changes or row.get("key") == shards.key(identifier)
