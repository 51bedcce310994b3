"""Finds what is wrong with a shard set: damaged files, pictures that moved, splits that share what they must not."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pyarrow import compute

from data_pipelines.decode import decode_image
from data_pipelines.shard_reader import read_shard
from data_pipelines.shard_set import ShardSet
from lookalike.artifacts import MANIFEST_NAME, file_sha256
from lookalike.errors import ArtifactError, DataError
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
        path = shard_set.folder / name
        if not path.is_file():
            yield Finding("error", "missing_file", f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            yield Finding(
                "error", "file_size", f"{name} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
            )
        elif file_sha256(path) != entry["sha256"]:
            yield Finding("error", "file_checksum", f"{name} differs from its manifest (SHA-256)")
    for path in sorted(shard_set.folder.iterdir()):
        if path.name not in files and path.name != MANIFEST_NAME:
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


def _picture_findings(shard_set: ShardSet, rows: Sequence[int]) -> list[Finding]:
    """Reads pictures by offset: their bytes, their decodability and their size must be as the table says."""
    problems = [
        (shard_set.key(row), problem)
        for row in track(rows, total=len(rows), description="pictures", unit="images")
        if (problem := _picture_problem(shard_set, row))
    ]
    return [
        Finding("error", kind, f"{len(keys)} of {len(rows)} pictures read: {_PROBLEMS[kind]}, first {keys[0]}")
        for kind in _PROBLEMS
        if (keys := [key for key, problem in problems if problem == kind])
    ]


_PROBLEMS = {
    "unreadable": "nothing to read at their offset",
    "picture_checksum": "the bytes at their offset are not those that were written (SHA-256)",
    "undecodable": "cannot be decoded",
    "picture_size": "width or height differs from the sample table",
}


def _picture_problem(shard_set: ShardSet, row: int) -> str | None:
    expected = shard_set.samples.slice(row, 1).select(["sha256", "width", "height"]).to_pylist()[0]
    try:
        data = shard_set.read_bytes(row)
    except ArtifactError:
        return "unreadable"
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        return "picture_checksum"
    try:
        image = decode_image(data, limits=shard_set.decode_limits)
    except DataError:
        return "undecodable"
    return None if image.size == (expected["width"], expected["height"]) else "picture_size"


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
