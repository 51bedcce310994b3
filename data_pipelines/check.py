"""Finds what is wrong with a shard set: damaged files, pictures that moved, splits that share what they must not."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow
from jaxtyping import Int64, UInt64
from numpy import ndarray
from PIL import Image
from pyarrow import compute

from data_pipelines.decode import decode_image
from data_pipelines.near_duplicates import HASH_BITS, MAX_DISTANCE, perceptual_hash, twins_across_groups
from data_pipelines.shard_cache import ORIGIN_NAME
from data_pipelines.shard_reader import read_shard
from data_pipelines.shard_set import ShardSet
from lookalike.artifacts import MANIFEST_NAME
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError
from lookalike.progress import track

NUM_SAMPLED_PICTURES = 256
_SAMPLING_SEED = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found; an error makes the shard set unfit for use, a warning is for a person to judge."""

    severity: Literal["error", "warning"]
    kind: str  # a short stable word
    message: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    num_samples: int
    num_pictures_read: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)


def check_shard_set(shard_set: ShardSet, *, full: bool = False) -> CheckReport:
    """Reads every byte of every file once; decodes a sample of the pictures, or with `full` each of them.

    The decoded ones are also compared across splits by their looks; of each, only its hash stays in memory.
    `full` also reads each shard the way a WebDataset reader does and compares that with access by offset.
    """
    findings = [*_file_findings(shard_set), *_table_findings(shard_set), *_split_findings(shard_set)]
    rows = range(shard_set.num_samples) if full else _sampled_rows(shard_set.num_samples)
    findings += _picture_findings(shard_set, rows)
    if full:
        findings += _streaming_findings(shard_set)
    return CheckReport(shard_set.num_samples, len(rows), tuple(findings))


def _file_findings(shard_set: ShardSet) -> Iterator[Finding]:
    files = shard_set.manifest.files
    for name, entry in track(files.items(), total=len(files), description="checksums", unit="files"):
        try:
            with shard_set.open_file(name) as file:
                num_bytes, sha256 = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except ChecksumMismatch:
            yield Finding("error", "missing_file", f"{name} is missing")
            continue
        except DataError as error:
            yield Finding("error", "missing_file", str(error))
            continue
        if num_bytes != entry["bytes"]:
            yield Finding("error", "file_size", f"{name} has {num_bytes} bytes, its manifest says {entry['bytes']}")
        elif sha256 != entry["sha256"]:
            yield Finding("error", "file_checksum", f"{name} differs from its manifest (SHA-256)")
    for path in sorted(shard_set.folder.iterdir()):
        if path.name not in files and path.name not in (MANIFEST_NAME, ORIGIN_NAME):
            yield Finding("warning", "unknown_file", f"{path.name} does not belong to the shard set")


def _table_findings(shard_set: ShardSet) -> Iterator[Finding]:
    """Whether the sample table agrees with itself, the classes and the manifest."""
    samples, details = shard_set.samples, shard_set.manifest.details
    shards = samples["shard"].to_numpy(zero_copy_only=False)
    splits = samples["split"].to_numpy(zero_copy_only=False)
    for name in shard_set.shard_names:
        rows = shard_set.rows_of_shard(name)
        part = slice(rows.start, rows.stop)
        if not ((shards[part] == name).all() and (splits[part] == details["shards"][name]["split"]).all()):
            yield Finding("error", "table", f"rows {rows.start} to {rows.stop} do not all belong to {name}")
    if sum(len(shard_set.rows_of_shard(name)) for name in shard_set.shard_names) != shard_set.num_samples:
        yield Finding("error", "table", "the manifest's shards do not add up to the sample table")
    if len(compute.unique(samples["key"])) != shard_set.num_samples:
        yield Finding("error", "table", "a key occurs twice in the sample table")
    names = np.array([*shard_set.class_names, None], dtype=object)
    if (names[shard_set.labels] != samples["class_name"].to_numpy(zero_copy_only=False)).any():
        yield Finding("error", "table", "class indices and class names of the sample table do not match")


def _split_findings(shard_set: ShardSet) -> Iterator[Finding]:
    for column, kind, what in (
        ("sha256", "duplicates_across_splits", "pictures are in more than one split, byte for byte"),
        ("class_name", "class_leakage", "classes are in more than one split"),
    ):
        groups = shard_set.samples.group_by(column).aggregate([("split", "count_distinct"), ("key", "min")])
        groups = groups.filter(compute.is_valid(groups[column]))
        shared = groups.filter(compute.greater(groups["split_count_distinct"], 1))
        if shared.num_rows:
            example = compute.min(shared["key_min"]).as_py()
            yield Finding("warning", kind, f"{shared.num_rows} of {groups.num_rows} {what}, such as that of {example}")


def _picture_findings(shard_set: ShardSet, rows: Sequence[int]) -> Iterator[Finding]:
    """Reads pictures by offset: their bytes, their decodability, their size, and whether splits share their looks."""
    keys_of_problem: dict[str, list[str]] = {problem: [] for problem in _PROBLEMS}
    seen: list[int] = []
    hashes: list[int] = []
    for row in track(rows, total=len(rows), description="pictures", unit="images"):
        image, problem = _decode(shard_set, row)
        if problem is not None:
            keys_of_problem[problem].append(shard_set.key(row))
        if image is not None and len(shard_set.splits) > 1:
            seen.append(row)
            hashes.append(perceptual_hash(image))
    for problem, keys in keys_of_problem.items():
        if keys:
            yield Finding(
                "error", problem, f"{len(keys)} of {len(rows)} pictures read: {_PROBLEMS[problem]}, first {keys[0]}"
            )
    yield from _near_duplicate_findings(shard_set, np.array(seen, np.int64), np.array(hashes, np.uint64))


def _near_duplicate_findings(
    shard_set: ShardSet, rows: Int64[ndarray, "pictures"], hashes: UInt64[ndarray, "pictures"]
) -> Iterator[Finding]:
    samples = shard_set.samples.take(rows)
    # What is the same byte for byte is another finding: one of each remains.
    _, first = np.unique(_codes(samples["sha256"]), return_index=True)
    twins = twins_across_groups(hashes[first], _codes(samples["split"])[first])
    found = np.flatnonzero(twins >= 0)
    if len(found):
        one, other = (shard_set.key(rows[first[index]]) for index in (found[0], twins[found[0]]))
        yield Finding(
            "warning",
            "near_duplicates_across_splits",
            f"{len(found)} of {len(rows)} pictures look like one of another split (their perceptual hashes differ in "
            f"at most {MAX_DISTANCE} of {HASH_BITS} bits), such as {one} and {other}",
        )


def _codes(column: pyarrow.ChunkedArray) -> Int64[ndarray, "values"]:
    """A number for each value, equal for equal ones."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


_PROBLEMS = {
    "unreadable": "nothing to read at their offset",
    "picture_checksum": "the bytes at their offset are not those that were written (SHA-256)",
    "undecodable": "cannot be decoded",
    "picture_size": "width or height differs from the sample table",
}


def _decode(shard_set: ShardSet, row: int) -> tuple[Image.Image | None, str | None]:
    """The picture, where there is one, and what is wrong."""
    expected = shard_set.samples.slice(row, 1).select(["sha256", "width", "height"]).to_pylist()[0]
    try:
        data = shard_set.read_bytes(row)
    except (ArtifactError, DataError):
        return None, "unreadable"
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        return None, "picture_checksum"
    try:
        image = decode_image(data, limits=shard_set.decode_limits)
    except DataError:
        return None, "undecodable"
    return image, None if image.size == (expected["width"], expected["height"]) else "picture_size"


def _streaming_findings(shard_set: ShardSet) -> Iterator[Finding]:
    names = shard_set.shard_names
    for name in track(names, total=len(names), description="streaming", unit="shards"):
        try:
            for row, data in read_shard(shard_set, name):
                if data != shard_set.read_bytes(row):
                    yield Finding("error", "offset", f"{shard_set.key(row)} is not at its offset in {name}")
        except (DataError, ArtifactError) as error:
            yield Finding("error", "streaming", str(error))


def _sampled_rows(num_samples: int) -> list[int]:
    random = np.random.default_rng(_SAMPLING_SEED)
    num_rows = min(num_samples, NUM_SAMPLED_PICTURES)
    return sorted(random.choice(num_samples, num_rows, replace=False).tolist())
