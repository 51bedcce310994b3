"""Shards -> embedding set, block by block: each rank takes shards, a rerun continues, the result is the same."""

import functools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from data_pipelines.loader import evaluation_batches
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import EvaluationTransform
from indexing.embedding_set import (
    EMBEDDING_SET_KIND,
    EMBEDDING_SET_VERSION,
    ENCODER_FOLDER,
    EmbeddingSet,
    SkippedPicture,
    block_is_written,
    gather_ledger,
    write_block,
)
from indexing.settings import EmbedSettings
from lookalike.artifacts import (
    Manifest,
    link_or_copy,
    locations_of,
    publishing,
    write_manifest,
    write_text_atomically,
)
from lookalike.collectives import barrier
from lookalike.encoder import Encoder, available_device, embed_pixels, write_encoder
from lookalike.errors import ArtifactError, DataError
from lookalike.native_libraries import keep_freed_memory
from lookalike.progress import Progress
from lookalike.settings import dump_settings
from lookalike.world import World

_MARKER_NAME = "identity.json"
_PICTURES_PER_THREAD = 16  # of the sizes tried, best or nearly so for every network; see benchmarks/freed_memory.py

logger = logging.getLogger(__name__)


def embed_shards(
    encoder: Encoder,
    shard_set: ShardSet,
    folder: Path,
    *,
    split: str | None = None,
    settings: EmbedSettings = EmbedSettings(),
    world: World = World(),
) -> EmbeddingSet:
    """Embeds every picture of `split` (all where None) and publishes the embedding set at `folder`.

    Finished blocks wait in a hidden folder beside it; a rerun with the same encoder and shards goes on from them.
    Vectors and their order do not depend on the number of ranks, since a batch never crosses a shard.

    Raises:
        DataError: there is no such split, or none of its pictures can be decoded.
        ArtifactError: `folder` holds an embedding set made from something else.
    """
    parents = {"shards": shard_set.fingerprint, "encoder": encoder.fingerprint}
    identity = embedding_identity(encoder, shard_set, split=split, settings=settings)
    if folder.exists():
        return _reuse(folder, identity)
    encoder.to(available_device())
    names = shard_set.shards_of(split)
    staging = staging_folder(folder)
    if world.is_first:
        _prepare_staging(staging, identity=identity)
    barrier(world)
    own = [name for name in names[world.rank :: world.size] if not block_is_written(staging, name)]
    transform = EvaluationTransform(encoder.settings.input)
    keys = shard_set.samples["key"]
    num_pictures = Counter(shard_set.samples["shard"].to_pylist())
    total = sum(num_pictures[name] for name in own)
    with (
        Progress(total, description="embedding", unit="pictures") as progress,
        _embedding(encoder, settings) as embed_batch,
    ):
        for name in own:
            vectors, ids, skipped = _embed_shard(encoder, shard_set, name, transform, embed_batch, settings, progress)
            ledger = [SkippedPicture(row, keys[row].as_py(), reason) for row, reason in skipped]
            write_block(staging, name, vectors, ids, [keys[int(row)].as_py() for row in ids], ledger)
    barrier(world)
    if world.is_first:
        details: dict[str, Any] = {
            "dim": encoder.dim,
            "split": split,
            "encoder_fingerprint": encoder.fingerprint,
            "transform_fingerprint": encoder.settings.input.fingerprint,
        }
        if encoder.whitening:
            details["whitening"] = dump_settings(encoder.whitening.settings)
            details["whitening_fingerprint"] = encoder.whitening.fingerprint
        locations = locations_of("shards", shard_set.folder, artifact=folder)
        manifest = Manifest(
            EMBEDDING_SET_KIND, EMBEDDING_SET_VERSION, parents, details, dump_settings(settings), locations
        )
        _publish(staging, folder, encoder, names, manifest)
    barrier(world)
    return EmbeddingSet.open(folder)


def embedding_identity(
    encoder: Encoder, shard_set: ShardSet, *, split: str | None, settings: EmbedSettings
) -> dict[str, object]:
    """All that decides the vectors: what a rerun must share with the run that it continues."""
    return {
        "shards": shard_set.fingerprint,
        "encoder": encoder.fingerprint,
        "transform": encoder.settings.input.fingerprint,
        "split": split,
        "storage": settings.storage,
        "precision": settings.precision,
    }


_EmbedBatch = Callable[[UInt8[Tensor, "batch 3 height width"]], Float32[Tensor, "batch dim"]]


@contextmanager
def _embedding(encoder: Encoder, settings: EmbedSettings) -> Iterator[_EmbedBatch]:
    """A function that embeds a batch, with the same bits however many threads there are.

    On a CPU a matrix product may be summed in another order by another number of threads, and processes that share a
    machine have fewer each. So each thread embeds a part of the batch on its own, and the parts have a fixed size.
    """
    embed_part = functools.partial(embed_pixels, encoder, precision=settings.precision)
    if encoder.mean.device.type != "cpu":
        yield embed_part
        return
    keep_freed_memory()
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="embed", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield lambda pixels: torch.cat(list(pool.map(embed_part, pixels.split(_PICTURES_PER_THREAD))))
    finally:
        pool.shutdown(cancel_futures=True)
        # The setting is each thread's own, but threads that are yet to start take the last one made.
        torch.set_num_threads(num_threads)


def _embed_shard(
    encoder: Encoder,
    shard_set: ShardSet,
    name: str,
    transform: EvaluationTransform,
    embed_batch: _EmbedBatch,
    settings: EmbedSettings,
    progress: Progress,
) -> tuple[ndarray, Int64[ndarray, "vectors"], list[tuple[int, str]]]:
    vectors: list[Float32[ndarray, "batch dim"]] = []
    ids: list[Int64[ndarray, batch]] = []
    skipped: list[tuple[int, str]] = []
    batches = evaluation_batches(
        shard_set, name, transform, batch_size=settings.batch_size, num_threads=torch.get_num_threads()
    )
    for batch in batches:
        skipped.extend(batch.skipped)
        if len(batch.rows):
            vectors.append(embed_batch(batch.pixels).numpy())
            ids.append(np.asarray(batch.rows, np.int64))
        progress.advance(len(batch.rows) + len(batch.skipped))
    if not ids:
        return np.zeros((0, encoder.dim), settings.storage), np.zeros(0, np.int64), skipped
    # Pictures that keep their shapes come grouped by them.
    order = np.argsort(np.concatenate(ids))
    return np.concatenate(vectors)[order].astype(settings.storage), np.concatenate(ids)[order], sorted(skipped)


def staging_folder(folder: Path) -> Path:
    """Where finished blocks wait."""
    return folder.with_name(f".unfinished-{folder.name}")


def _prepare_staging(staging: Path, *, identity: dict[str, object]) -> None:
    marker = staging / _MARKER_NAME
    text = json.dumps(identity, sort_keys=True)
    if marker.exists() and marker.read_text(encoding="utf-8") == text:
        logger.info("continuing the embedding set begun in %s", staging)
        return
    if staging.exists() and not marker.exists():
        raise ArtifactError(f"{staging} is in the way: it is not an unfinished embedding set. Move it.")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_text_atomically(marker, text)


def _publish(staging: Path, folder: Path, encoder: Encoder, names: list[str], manifest: Manifest) -> None:
    with publishing(folder) as temporary:
        # Copied by hard link: a publication that fails leaves the staging folder whole.
        shutil.copytree(staging / "blocks", temporary / "blocks", copy_function=_link)
        num_skipped = gather_ledger(temporary, names)
        (temporary / ENCODER_FOLDER).mkdir()
        write_encoder(encoder, temporary / ENCODER_FOLDER)
        num_vectors = sum(np.load(temporary / "blocks" / f"{name}.npy", mmap_mode="r").shape[0] for name in names)
        if num_vectors == 0:
            raise DataError(f"none of the {num_skipped} pictures could be embedded; see {staging}.")
        details = {**manifest.details, "blocks": names, "num_vectors": num_vectors, "num_skipped": num_skipped}
        write_manifest(temporary, replace(manifest, details=details))
    shutil.rmtree(staging)


def _link(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


def _reuse(folder: Path, identity: dict[str, object]) -> EmbeddingSet:
    existing = EmbeddingSet.open(folder)
    manifest = existing.manifest
    found = {
        **manifest.parents,
        "transform": manifest.details["transform_fingerprint"],
        "split": manifest.details["split"],
        "storage": manifest.settings["storage"],
        "precision": manifest.settings.get("precision", "float32"),  # sets made before there was a choice
    }
    if found != identity:
        different = [name for name in identity if found.get(name) != identity[name]]
        raise ArtifactError(
            f"{folder} was made with another {', '.join(different)}. Remove it, or choose another folder."
        )
    logger.info("%s is up to date", folder)
    return existing
