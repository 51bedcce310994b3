"""Is a version what it was when it was built? Its bytes, its encoder, its canaries."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.decode import decode_image
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import EvaluationTransform
from indexing.building.verification import require_ids_found
from indexing.published_index import PublishedIndex, load_encoder_of, read_index_manifest
from lookalike.artifacts import require_parent, verify_files
from lookalike.encoder import Encoder, embed_pixels
from lookalike.errors import ArtifactError, DamagedArtifact, DataError, ManifestMismatch

_LEAST_COSINE = 0.999  # of one picture embedded twice: other devices and precisions stay well above


def check_index(index_folder: Path, version: str, *, shards: Path | None = None) -> Iterator[str]:
    """Yields a line for each thing that was found to be in order.

    Bytes are compared before anything is made of them: faiss may crash on a damaged file.

    Args:
        shards: Where the pictures are; where None, where they were when the index was built, if they still are.

    Raises:
        ArtifactError: something is not in order; the message names it.
    """
    manifest = read_index_manifest(index_folder / version)
    encoder = None
    if "encoder_fingerprint" in manifest.details:
        encoder = load_encoder_of(index_folder / version, manifest)
        yield f"encoder {encoder.fingerprint[:12]} is the one that made the vectors"
    verify_files(index_folder / version, manifest)
    yield f"{len(manifest.files)} files have the bytes of the manifest"
    index = PublishedIndex.open(index_folder, version=version)
    canaries = np.array(index.manifest.details["canary_ids"], np.int64)
    try:
        require_ids_found(index, index.type, index.store, canaries)
    except (DataError, KeyError) as error:
        raise DamagedArtifact(f"index {index.folder}: {error}") from error
    yield f"{len(canaries)} canaries are found under their ids, exactly and approximately"
    folder = shards or _known_shards(index)
    if encoder is not None and folder is not None:
        _require_same_pictures(index, encoder, folder, canaries)
        yield f"{len(canaries)} canary pictures, embedded again, give their vectors"


def _known_shards(index: PublishedIndex) -> Path | None:
    try:
        folder = index.shards_folder
    except ArtifactError:
        return None
    # After additions and replacements, ids no longer tell pictures of the shard set.
    return folder if folder.exists() and "embeddings" in index.manifest.parents else None


def _require_same_pictures(
    index: PublishedIndex, encoder: Encoder, folder: Path, canaries: Int64[ndarray, "canaries"]
) -> None:
    transform = EvaluationTransform(encoder.settings.input)
    with ShardSet.open(folder) as shard_set:
        require_parent(index.folder, index.manifest, "shards", found=shard_set.fingerprint, parent=folder)
        for identifier, stored in zip(canaries.tolist(), index.vectors_of(canaries), strict=True):
            picture = decode_image(shard_set.read_bytes(identifier), limits=shard_set.decode_limits)
            [vector] = embed_pixels(encoder, torch.from_numpy(transform(picture)[None])).numpy()
            cosine = float(vector @ stored / (np.linalg.norm(vector) * np.linalg.norm(stored)))
            if not cosine >= _LEAST_COSINE:
                raise ManifestMismatch(
                    f"index {index.folder}: picture {identifier} ({shard_set.key(identifier)}), embedded again, has "
                    f"cosine {cosine:.4f} with its stored vector, expected at least {_LEAST_COSINE}. The encoder or "
                    "its libraries give other vectors than those indexed: embed again."
                )
