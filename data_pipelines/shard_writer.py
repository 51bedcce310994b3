"""Pictures -> shard set, in parallel by shard, resumable after a kill, to the same bytes every time."""

import fcntl
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from data_pipelines.decode import cropped, decode_with_format
from data_pipelines.settings import Reencode, ShardSettings
from data_pipelines.shard_plan import PlannedShard, ShardPlan, plan_shards
from data_pipelines.shard_set import (
    CLASSES_NAME,
    CLASSES_SCHEMA,
    QUARANTINE_NAME,
    QUARANTINE_SCHEMA,
    SAMPLES_NAME,
    SAMPLES_SCHEMA,
    SHARD_SET_KIND,
    SHARD_SET_VERSION,
    ShardSet,
)
from data_pipelines.sources import PictureSource, SourcePicture
from lookalike.artifacts import Manifest, file_sha256, link_or_copy, publishing, write_manifest, write_text_atomically
from lookalike.errors import ArtifactError, DataError, DecodeError, ResourceError
from lookalike.progress import Progress
from lookalike.settings import dump_settings
from lookalike.worker_processes import prepare_worker

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_TAR_BLOCK = tarfile.BLOCKSIZE
_PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_UNREADABLE = "unreadable"  # the reason in quarantine of a file that could not be opened
_NUM_NAMED = 3  # bad pictures in a message
_SHARD_SHA256 = b"shard_sha256"  # in the metadata of a shard's sample table

logger = logging.getLogger(__name__)


def write_shards(source: PictureSource, folder: Path, settings: ShardSettings, *, num_processes: int = 1) -> ShardSet:
    """Writes the shard set `folder`, or reuses it if it was made from the same source and settings.

    Finished shards wait in a hidden folder beside `folder`, so that a killed run continues where it was. One
    picture and its bytes per process are in memory at a time, and the rows of all samples.

    Raises:
        DataError: the source is refused, or too many pictures are bad; the message names their listing.
        ArtifactError: `folder` exists and was made from something else.
        ResourceError: another process is writing `folder`, or a writing process was killed.
    """
    plan = plan_shards(source, settings)
    finished = finished_shard_set(folder, plan)
    if finished is not None:
        logger.info("%s is finished already, from the same pictures and settings.", folder)
        shutil.rmtree(_staging_folder(folder), ignore_errors=True)
        return finished
    with _staging(folder, plan) as staging:
        _write_missing_shards(plan, staging, settings, num_processes=num_processes)
        _publish(plan, staging, folder, settings)
    return ShardSet.open(folder)


def finished_shard_set(folder: Path, plan: ShardPlan) -> ShardSet | None:
    """The shard set that this plan has made earlier, or None where `folder` does not exist.

    Raises:
        ArtifactError: `folder` is something else.
    """
    if not folder.exists():
        return None
    shard_set = ShardSet.open(folder)
    if shard_set.manifest.settings.get("plan") != plan.fingerprint:
        raise ArtifactError(
            f"{folder} was made from other pictures or settings than those given now. "
            "Remove it, or choose another folder."
        )
    shard_set.check()
    return shard_set


def measure_seconds_per_picture(plan: ShardPlan, settings: ShardSettings, *, num_pictures: int = 32) -> float:
    """Mean time of one process to read, check and encode a picture, measured on a few spread over the plan."""
    num_measured = min(num_pictures, plan.num_pictures)
    every = chain.from_iterable(shard.pictures for shard in plan.shards)
    started = time.perf_counter()
    for picture in islice(
        every, 0, num_measured * (plan.num_pictures // num_measured), plan.num_pictures // num_measured
    ):
        with suppress(DecodeError):
            _stored_picture(picture, settings)
    return (time.perf_counter() - started) / num_measured


@contextmanager
def _staging(folder: Path, plan: ShardPlan) -> Iterator[Path]:
    """The folder of finished shards: kept while the plan stays the same, emptied when it changes, removed at the end.

    It stays after an error, for the next run to continue.
    """
    staging = _staging_folder(folder)
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / _LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"another process is writing {folder}. Wait for it, or end it.") from None
        plan_file = staging / _PLAN_NAME
        if not plan_file.exists() or plan_file.read_text(encoding="utf-8") != plan.fingerprint:
            for path in staging.iterdir():
                if path.name != _LOCK_NAME:
                    path.unlink()
            write_text_atomically(plan_file, plan.fingerprint)
        yield staging
        shutil.rmtree(staging)


def _write_missing_shards(plan: ShardPlan, staging: Path, settings: ShardSettings, *, num_processes: int) -> None:
    """Leaves every shard of the plan finished in `staging`, or raises as soon as too many pictures are bad."""
    finished = [shard for shard in plan.shards if _is_kept(shard, staging)]
    missing = [shard for shard in plan.shards if not _is_kept(shard, staging)]
    num_done = sum(len(shard.pictures) for shard in finished)
    num_bad = sum(_num_quarantined(shard, staging) for shard in finished)
    if finished:
        logger.info("continuing: %d of %d shards are there already", len(finished), len(plan.shards))
    with Progress(plan.num_pictures, description="writing shards", unit="images", done=num_done) as progress:
        for shard in _written(missing, staging, settings, num_processes=num_processes):
            num_bad += _num_quarantined(shard, staging)
            progress.advance(len(shard.pictures), note=f"{num_bad} bad" if num_bad else "")
            if num_bad > settings.max_quarantine_share * plan.num_pictures:
                break
    if num_bad > settings.max_quarantine_share * plan.num_pictures or num_bad == plan.num_pictures:
        raise _too_many_bad(plan, staging, settings, num_bad)


def _written(
    shards: list[PlannedShard], staging: Path, settings: ShardSettings, *, num_processes: int
) -> Iterator[PlannedShard]:
    """Writes the shards and yields each as it is finished."""
    if num_processes == 1 or len(shards) < 2:
        for shard in shards:
            write_shard(shard, staging, settings)
            yield shard
        return
    pool = ProcessPoolExecutor(
        min(num_processes, len(shards)),
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=prepare_worker,
    )
    waiting = iter(shards)
    running: dict[Future[None], PlannedShard] = {}
    try:
        while True:
            # Few jobs wait at a time: each carries its list of pictures.
            for shard in islice(waiting, 2 * num_processes - len(running)):
                running[pool.submit(write_shard, shard, staging, settings)] = shard
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
    except BrokenProcessPool as error:
        raise ResourceError(
            "a writing process was killed, most likely for want of memory. Run again with fewer processes: "
            "finished shards are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_shard(shard: PlannedShard, staging: Path, settings: ShardSettings) -> None:
    """Writes one tar, then its quarantine list, then its sample table: with the table the shard counts as finished."""
    rows: list[dict[str, Any]] = []
    quarantine: list[dict[str, str]] = []
    with _atomically(staging / shard.name) as temporary, tarfile.open(temporary, "w") as archive:
        for picture, label in zip(shard.pictures, shard.labels, strict=True):
            try:
                stored = _stored_picture(picture, settings)
            except DecodeError as error:
                quarantine.append(
                    {
                        "key": picture.key,
                        "path": _printable(str(picture.path)) or "",
                        "reason": error.reason,
                        "message": str(error),
                    }
                )
                continue
            offset = _add_member(archive, f"{picture.key}.{stored.extension}", stored.data)
            row = {
                "key": picture.key,
                "label": label,
                "class_name": _printable(picture.label),
                "coarse_label": _printable(picture.coarse_label),
                "split": shard.split,
            }
            _add_member(archive, f"{picture.key}.json", json.dumps(row).encode())
            rows.append(
                {
                    **row,
                    "shard": shard.name,
                    "offset": offset,
                    "size": len(stored.data),
                    "extension": stored.extension,
                    "width": stored.width,
                    "height": stored.height,
                    "sha256": hashlib.sha256(stored.data).hexdigest(),
                }
            )
    _write_table(_quarantine_file(shard, staging), quarantine, QUARANTINE_SCHEMA)
    # Taken here, by one process per shard, not for all shards by the one that publishes.
    checksum = {_SHARD_SHA256: file_sha256(staging / shard.name)}
    _write_table(_samples_file(shard, staging), rows, SAMPLES_SCHEMA.with_metadata(checksum))


@dataclass(frozen=True, slots=True)
class _StoredPicture:
    data: bytes
    extension: str
    width: int
    height: int


def _stored_picture(picture: SourcePicture, settings: ShardSettings) -> _StoredPicture:
    """Reads and decodes a picture once, to verify it and to learn its size."""
    data = _source_bytes(picture, max_bytes=settings.limits.max_bytes)
    whole, image_format = decode_with_format(data, limits=settings.limits)
    image = whole if picture.box is None else cropped(whole, picture.box)
    if isinstance(settings.encoding, Reencode):
        # A crop shrinks as much as its whole picture would: things keep their size relative to other pictures.
        side = max(1, round(settings.encoding.max_side * max(image.size) / max(whole.size)))
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
        return _encoded(image, "jpg", format="JPEG", quality=settings.encoding.quality)
    if picture.box is not None:
        return _encoded(image, "png", format="PNG")
    return _StoredPicture(data, _EXTENSIONS[image_format], *image.size)


def _source_bytes(picture: SourcePicture, *, max_bytes: int) -> bytes:
    """At most one byte more than allowed, which is enough to refuse the picture, whatever its size."""
    offset, size = picture.span or (0, max_bytes + 1)
    try:
        with picture.path.open("rb") as file:
            file.seek(offset)
            return file.read(min(size, max_bytes + 1))
    except OSError as error:
        raise DecodeError(_UNREADABLE, f"the file cannot be read: {error.strerror}") from error


def _encoded(image: Image.Image, extension: str, **options: Any) -> _StoredPicture:
    buffer = io.BytesIO()
    image.save(buffer, exif=b"", icc_profile=None, **options)
    return _StoredPicture(buffer.getvalue(), extension, *image.size)


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a file that looks the same whoever writes it and whenever; returns the offset of its first byte."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
    # Measured from the end: headers of long names take more than one block.
    return archive.offset - -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK


def _publish(plan: ShardPlan, staging: Path, folder: Path, settings: ShardSettings) -> None:
    """Gathers the finished shards and their tables into `folder`, all at once."""
    tables = [parquet.read_table(_samples_file(shard, staging)) for shard in plan.shards]
    samples = pyarrow.concat_tables(tables).combine_chunks().replace_schema_metadata(None)
    quarantine = _gathered_quarantine(plan, staging)
    shards: dict[str, dict[str, Any]] = {}
    known_sha256: dict[str, str] = {}
    first_row = 0
    with publishing(folder) as temporary:
        for shard, table in zip(plan.shards, tables, strict=True):
            if table.num_rows == 0:
                continue
            link_or_copy(staging / shard.name, temporary / shard.name)
            shards[shard.name] = {"split": shard.split, "first_row": first_row, "num_samples": table.num_rows}
            known_sha256[shard.name] = table.schema.metadata[_SHARD_SHA256].decode()
            first_row += table.num_rows
        parquet.write_table(samples, temporary / SAMPLES_NAME)
        parquet.write_table(quarantine, temporary / QUARANTINE_NAME)
        class_names = [_printable(name) for name in plan.class_names]
        parquet.write_table(pyarrow.table([class_names], schema=CLASSES_SCHEMA), temporary / CLASSES_NAME)
        splits = samples.group_by("split").aggregate([([], "count_all")]).to_pydict()
        write_manifest(
            temporary,
            Manifest(
                kind=SHARD_SET_KIND,
                format_version=SHARD_SET_VERSION,
                details={
                    "num_samples": samples.num_rows,
                    "num_quarantined": quarantine.num_rows,
                    "num_classes": len(class_names),
                    "splits": dict(zip(splits["split"], splits["count_all"], strict=True)),
                    "shards": shards,
                    **({"data_set": plan.data_set} if plan.data_set else {}),
                },
                settings={"shards": dump_settings(settings), "plan": plan.fingerprint},
            ),
            known_sha256=known_sha256,
        )


def _too_many_bad(plan: ShardPlan, staging: Path, settings: ShardSettings, num_bad: int) -> DataError:
    quarantine = _gathered_quarantine(plan, staging)
    listing = staging / QUARANTINE_NAME
    parquet.write_table(quarantine, listing)
    reasons = quarantine.group_by("reason").aggregate([([], "count_all")]).to_pydict()
    counts = ", ".join(
        f"{count} {reason}" for count, reason in zip(reasons["count_all"], reasons["reason"], strict=True)
    )
    first = ", ".join(quarantine["path"].to_pylist()[:_NUM_NAMED])
    return DataError(
        f"at least {num_bad} of {plan.num_pictures} pictures are bad ({counts}), "
        f"{settings.max_quarantine_share:.2%} are allowed: {first}{', ...' * (num_bad > _NUM_NAMED)} "
        f"(all in {listing}). Repair or remove them, or allow a larger share (--max-bad-share)."
    )


def _gathered_quarantine(plan: ShardPlan, staging: Path) -> pyarrow.Table:
    files = [_quarantine_file(shard, staging) for shard in plan.shards if _is_finished(shard, staging)]
    return pyarrow.concat_tables([parquet.read_table(file) for file in files]).combine_chunks()


def _staging_folder(folder: Path) -> Path:
    return folder.parent / f".unfinished-{folder.name}"


def _is_finished(shard: PlannedShard, staging: Path) -> bool:
    return _samples_file(shard, staging).exists()


def _is_kept(shard: PlannedShard, staging: Path) -> bool:
    """Finished, and every file could be opened: what stood in the way may be gone, and leaves no trace in a file."""
    if not _is_finished(shard, staging):
        return False
    return (
        _UNREADABLE
        not in parquet.read_table(_quarantine_file(shard, staging), columns=["reason"])["reason"].to_pylist()
    )


def _num_quarantined(shard: PlannedShard, staging: Path) -> int:
    return int(parquet.read_metadata(_quarantine_file(shard, staging)).num_rows)


def _samples_file(shard: PlannedShard, staging: Path) -> Path:
    return staging / f"{shard.name}.{SAMPLES_NAME}"


def _quarantine_file(shard: PlannedShard, staging: Path) -> Path:
    return staging / f"{shard.name}.{QUARANTINE_NAME}"


def _write_table(path: Path, rows: list[Any], schema: pyarrow.Schema) -> None:
    with _atomically(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)


@contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` once its bytes are safely on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _printable(name: str | None) -> str | None:
    """File names may hold bytes that are not UTF-8, tables may not."""
    return None if name is None else name.encode(errors="surrogateescape").decode(errors="replace")
