"""Which pictures go into which shard: a pure function of the source's list, the files' sizes and the settings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import PIL

from data_pipelines.settings import Reencode, ShardSettings
from data_pipelines.shard_set import SHARD_SET_VERSION
from data_pipelines.sources import PictureSource, SourcePicture
from data_pipelines.sources.data_set import DataSet
from lookalike.artifacts import fingerprint
from lookalike.errors import DataError
from lookalike.settings import dump_settings


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One tar to write; holds one split only, its pictures in the order of their keys."""

    name: str
    split: str
    pictures: tuple[SourcePicture, ...]
    labels: tuple[int, ...]  # class index of each picture, -1 for none
    num_bytes: int  # of the source's files


@dataclass(frozen=True, slots=True)
class ShardPlan:
    shards: tuple[PlannedShard, ...]
    class_names: tuple[str, ...]  # in the order of the class index
    fingerprint: str  # of everything that the shards' bytes depend on
    data_set: Mapping[str, Any] = field(default_factory=dict)  # `Examination.facts`, empty for other sources

    @property
    def num_pictures(self) -> int:
        return sum(len(shard.pictures) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def plan_shards(source: PictureSource, settings: ShardSettings) -> ShardPlan:
    """Lists the source, looks up the size of each file, reads none.

    Raises:
        DataError: the source refuses its files, or one of them vanished.
    """
    listed, data_set = _listed(source)
    pictures = sorted(listed, key=lambda picture: (picture.split, picture.key))
    class_names = _ordered_classes({picture.label for picture in pictures if picture.label is not None})
    index_of_class = {name: index for index, name in enumerate(class_names)}
    shards: list[PlannedShard] = []
    identity: list[Any] = [shard_identity(settings)]
    num_common = len(os.path.commonpath([picture.path.parent for picture in pictures]))
    for split, group in groupby(pictures, key=lambda picture: picture.split):
        sized = []
        for picture in group:
            num_bytes, changed = _size_and_change_time(picture)
            sized.append((picture, num_bytes))
            # Where the bytes lie within the source, since a key can be given to others of the same size and time.
            place = [str(picture.path)[num_common:], picture.span, picture.box]
            identity.append([picture.key, picture.label, picture.coarse_label, split, num_bytes, changed, *place])
        for number, (part, num_bytes) in enumerate(_cut(sized, settings.max_shard_bytes)):
            labels = tuple(-1 if picture.label is None else index_of_class[picture.label] for picture in part)
            shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, tuple(part), labels, num_bytes))
    return ShardPlan(tuple(shards), tuple(class_names), fingerprint(identity), data_set)


def _listed(source: PictureSource) -> tuple[Sequence[SourcePicture], dict[str, Any]]:
    if not isinstance(source, DataSet):
        return source.pictures(), {}
    examination = source.examine()
    examination.require_usable()
    return examination.pictures, examination.facts()


def shard_identity(settings: ShardSettings) -> dict[str, Any]:
    """The settings and programs that change the shards' bytes."""
    tree = dump_settings(settings)
    del tree["max_quarantine_share"]
    # A continued set must not mix the bytes of two encoders or two layouts.
    encoder = PIL.__version__ if isinstance(settings.encoding, Reencode) else None
    return {**tree, "format_version": SHARD_SET_VERSION, "encoder": encoder}


def _cut(sized: Sequence[tuple[SourcePicture, int]], max_bytes: int) -> list[tuple[list[SourcePicture], int]]:
    """Fills one shard after the other; a picture larger than a shard gets one of its own."""
    parts: list[tuple[list[SourcePicture], int]] = []
    part: list[SourcePicture] = []
    total = 0
    for picture, num_bytes in sized:
        if part and total + num_bytes > max_bytes:
            parts.append((part, total))
            part, total = [], 0
        part.append(picture)
        total += num_bytes
    return [*parts, (part, total)]


def _ordered_classes(names: set[str]) -> list[str]:
    """By number where all names are numbers, else by name."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _size_and_change_time(picture: SourcePicture) -> tuple[int, int]:
    try:
        status = picture.path.stat()
    except OSError as error:
        raise DataError(f"{picture.path} cannot be read: {error.strerror}") from error
    return status.st_size if picture.span is None else picture.span[1], status.st_mtime_ns
