"""Existing WebDataset tars: their pictures are read where they lie, without unpacking."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from data_pipelines.sources import PICTURE_SUFFIXES, SourcePicture, files_below, safe_keys
from data_pipelines.sources.data_set import DataSet
from lookalike.errors import DataError

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key, then suffix: all from the first dot
_SHARD_NUMBER = re.compile(r"[-_.]?\d+$")
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class _Member:
    """One file in a tar."""

    tar: Path
    key: str
    suffix: str
    offset: int
    size: int

    def text(self) -> str:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size).decode("utf-8")


class WebDatasetTars(DataSet):
    """`folder` may also be a single tar. A tar's name without its number is the split: train-000001.tar."""

    data_set: Literal["webdataset"] = "webdataset"
    picture_file: str | None = None
    """Suffix of the picture where a sample has several, such as jpg."""
    label_file: Literal["cls", "json", "txt"] | None = None
    """Which file holds the class; by default cls, or json without it, or none."""
    label_field: str | None = None
    """Field of the json that holds the class; by default class_name, or label without it."""
    split: str | None = None
    """Name of the one split, whatever the tars are called."""
    prefixes_keys: bool = False
    """Put the tar's name before each key: for sets that count from zero in every tar."""

    @model_validator(mode="after")
    def _field_is_read(self) -> "WebDatasetTars":
        if self.label_field is not None and self.label_file not in (None, "json"):
            raise ValueError("label_field has no effect unless the class is in the json")
        return self

    def required_paths(self) -> list[str]:
        return ["."]

    def listed(self) -> list[SourcePicture]:
        tars = (
            [self.root]
            if self.root.is_file()
            else sorted(path for path in files_below(self.root) if path.suffix == ".tar")
        )
        samples = [sample for tar in tars for sample in _samples(tar)]
        names = [self._name(sample[0]) for sample in samples]
        self._refuse_repetitions(names, samples)
        keys = safe_keys(names)
        return [self._picture(key, sample) for key, sample in zip(keys, samples, strict=True)]

    def _refuse_repetitions(self, names: list[str], samples: list[list[_Member]]) -> None:
        counts = Counter(names)
        for name, sample in zip(names, samples, strict=True):
            if counts[name] > 1:
                raise DataError(
                    f"{self.root}: key {name!r} occurs {counts[name]} times, first in {sample[0].tar}. The files of a "
                    "sample must be neighbours; where tars repeat each other's keys, set prefixes_keys=true."
                )

    def _name(self, member: _Member) -> str:
        key = member.key.removeprefix("./").lstrip("/")
        return f"{member.tar.stem.replace('.', '_')}/{key}" if self.prefixes_keys else key

    def _picture(self, key: str, sample: list[_Member]) -> SourcePicture:
        tar = sample[0].tar
        pictures = [member for member in sample if self._is_picture(member)]
        if len(pictures) != 1:
            files = ", ".join(member.suffix for member in sample)
            raise DataError(
                f"{tar}: sample {sample[0].key!r} should hold one picture, found {len(pictures)} among {files}. "
                "picture_file chooses one by its suffix."
            )
        try:
            label, coarse_label = self._labels({member.suffix.lower(): member for member in sample})
        except ValueError as error:
            raise DataError(f"{tar}: the class of sample {sample[0].key!r} cannot be read: {error}") from error
        split = self.split or _SHARD_NUMBER.sub("", tar.stem) or "all"
        return SourcePicture(key, tar, label, split, coarse_label, span=(pictures[0].offset, pictures[0].size))

    def _is_picture(self, member: _Member) -> bool:
        if self.picture_file is not None:
            return member.suffix.lower() == self.picture_file.lower()
        return f".{member.suffix.lower()}" in PICTURE_SUFFIXES

    def _labels(self, members: dict[str, _Member]) -> tuple[str | None, str | None]:
        """Class and coarse label."""
        default = "cls" if "cls" in members and self.label_field is None else "json"
        label_file = self.label_file or default
        if label_file not in members:
            if self.label_file is not None or self.label_field is not None:
                raise ValueError(f"there is no {label_file} file")
            return None, None
        text = members[label_file].text()
        if label_file != "json":
            return text.strip() or None, None
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("the json is no object")
        field = self.label_field or ("class_name" if "class_name" in record else "label")
        if self.label_field is not None and field not in record:
            raise ValueError(f"the json has no field {field!r}")
        return _name_of(record.get(field)), _name_of(record.get("coarse_label"))


def _name_of(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str | int):
        raise ValueError(f"{value!r} is neither text nor a whole number")
    return str(value)


def _samples(tar: Path) -> Iterator[list[_Member]]:
    """The files of a tar by sample, as WebDataset groups them: neighbours with the same key."""
    for _, members in groupby(_members(tar), key=lambda member: member.key):
        yield list(members)


def _members(tar: Path) -> Iterator[_Member]:
    """Every file that WebDataset would read.

    Raises:
        DataError: the tar is compressed, cut or garbled. `tarfile` ends quietly at a garbled header, so the rest of
            the file is checked to be what ends a tar: zeros.
    """
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for entry in archive:
                end = entry.offset_data + (-(-entry.size // _BLOCK) * _BLOCK if entry.isreg() else 0)
                if entry.issparse() or not (entry.isreg() or entry.isdir()):
                    raise DataError(f"{tar}: {entry.name!r} is a link or the like. Pack the files themselves.")
                match = _MEMBER_NAME.fullmatch(entry.name)
                if match and entry.isreg() and not match[1].rpartition("/")[2].startswith("__"):
                    yield _Member(tar, match[1], match[2], entry.offset_data, entry.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} cannot be read as an uncompressed tar: {error}. Unpack or fetch it again.") from error
    _require_end(tar, end)


def _require_end(tar: Path, end: int) -> None:
    with tar.open("rb") as file:
        file.seek(end)
        if len(file.peek(1)) == 0:
            raise DataError(f"{tar} was cut: it has no end mark after byte {end}. Fetch it again.")
        while block := file.read(1 << 20):
            if any(block):
                raise DataError(f"{tar} is garbled after byte {end}: what follows is no file. Fetch it again.")
