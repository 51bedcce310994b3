"""Embedding set -> encoder with a whitening fitted to it; the vectors stream."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from indexing.embedding_set import ENCODER_FOLDER, EmbeddingSet
from indexing.sources.embeddings import EmbeddingSource
from lookalike.artifacts import require_parent
from lookalike.encoder import Encoder, load_encoder, save_encoder
from lookalike.encoder_settings import WhiteningSettings
from lookalike.errors import ArtifactError, DataError, SettingsError
from lookalike.settings import dump_settings
from lookalike.whitening import VectorMoments, learned_whitening, pca_whitening

_PAIRS_AT_ONCE = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairMoments:
    """How matching pairs differ."""

    covariance: Float64[ndarray, "dim dim"]  # mean outer product of their differences
    fitted_on: dict[str, Any]  # counts, and the SHA-256 of pairs that were given


def publish_whitened_encoder(
    embeddings: EmbeddingSet, folder: Path, settings: WhiteningSettings, *, pairs: Path | None = None
) -> Encoder:
    """Publishes `whitened_encoder` at `folder`; the same one that is there already is kept, and nothing is fitted.

    Raises:
        ArtifactError: `folder` holds something else, or is damaged; and as `whitened_encoder`.
    """
    _require_use_of_pairs(settings, pairs)
    if folder.exists():
        return _reuse(folder, embeddings, settings, pairs)
    encoder = whitened_encoder(embeddings, settings, pairs=pairs)
    save_encoder(encoder, folder)
    return encoder


def _reuse(folder: Path, embeddings: EmbeddingSet, settings: WhiteningSettings, pairs: Path | None) -> Encoder:
    encoder = load_encoder(folder)
    if encoder.whitening is None:
        raise ArtifactError(f"{folder} holds an encoder without whitening. Remove it, or choose another folder.")
    fitted_on = encoder.whitening.fitted_on
    found = {
        **dump_settings(encoder.whitening.settings),
        "embeddings": fitted_on.get("embeddings"),
        "pairs": fitted_on.get("pairs"),
    }
    wanted = {
        **dump_settings(settings),
        "embeddings": embeddings.fingerprint,
        "pairs": _sha256(_read_pairs(pairs)) if pairs else None,
    }
    if found != wanted:
        different = ", ".join(name for name in wanted if found[name] != wanted[name])
        raise ArtifactError(f"{folder} was fitted with another {different}. Remove it, or choose another folder.")
    logger.info("%s is up to date", folder)
    return encoder


def _require_use_of_pairs(settings: WhiteningSettings, pairs: Path | None) -> None:
    if pairs is not None and settings.method != "learned":
        raise SettingsError(f"whitening by {settings.method} takes no pairs; choose the method learned.")


def whitened_encoder(embeddings: EmbeddingSet, settings: WhiteningSettings, *, pairs: Path | None = None) -> Encoder:
    """The encoder of an embedding set with a whitening fitted to its vectors.

    Args:
        pairs: For `learned`: a `.npy` of ids [pairs, 2] that match; where absent, pictures of one class match.

    Raises:
        SettingsError: `pairs` without `learned`, or more dimensions than there are.
        DataError: too few vectors, classes or pairs; or pairs of pictures that have no vector.
        ArtifactError: the set is damaged, its encoder is whitened already, or its shards have changed.
    """
    _require_use_of_pairs(settings, pairs)
    embeddings.check()
    encoder = load_encoder(embeddings.folder / ENCODER_FOLDER)
    if encoder.whitening:
        raise ArtifactError(
            f"the encoder of {embeddings.folder} is whitened already. Fit to vectors of the encoder without whitening."
        )
    moments = VectorMoments(embeddings.dim)
    for block in EmbeddingSource(embeddings).blocks():
        moments.add(block.vectors)
    fitted_on: dict[str, Any] = {"embeddings": embeddings.fingerprint, "num_vectors": moments.num_vectors}
    if settings.method == "pca":
        encoder.whitening = pca_whitening(moments.mean, moments.covariance, settings, fitted_on=fitted_on)
        return encoder
    matching = _moments_of_pairs(embeddings, pairs) if pairs else _moments_of_classes(embeddings)
    encoder.whitening = learned_whitening(
        moments.mean,
        moments.covariance,
        matching.covariance,
        settings,
        fitted_on={**fitted_on, **matching.fitted_on},
    )
    return encoder


def _moments_of_pairs(embeddings: EmbeddingSet, path: Path) -> PairMoments:
    """Keeps the vectors of all ids that are in a pair: 4 * dim bytes each."""
    pairs = _read_pairs(path)
    wanted, places = np.unique(pairs, return_inverse=True)
    vectors = np.zeros((len(wanted), embeddings.dim), np.float32)
    is_found = np.zeros(len(wanted), bool)
    for block in EmbeddingSource(embeddings).blocks():
        rows = np.minimum(np.searchsorted(wanted, block.ids), len(wanted) - 1)
        is_wanted = wanted[rows] == block.ids
        vectors[rows[is_wanted]] = block.vectors[is_wanted]
        is_found[rows[is_wanted]] = True
    if not is_found.all():
        raise DataError(
            f"{path} names {int((~is_found).sum())} pictures that have no vector in {embeddings.folder}, such as id "
            f"{int(wanted[~is_found][0])}."
        )
    outer_sum = np.zeros((embeddings.dim, embeddings.dim))
    places = places.reshape(pairs.shape)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        left, right = places[start : start + _PAIRS_AT_ONCE].T
        differences = vectors[left].astype(np.float64) - vectors[right]
        outer_sum += differences.T @ differences
    return PairMoments(outer_sum / len(pairs), {"num_pairs": len(pairs), "pairs": _sha256(pairs)})


def _moments_of_classes(embeddings: EmbeddingSet) -> PairMoments:
    """Of all pairs within each class, a class weighing as much as it has pictures less one.

    That is twice the covariance within classes, so no pair is ever formed. Keeps a vector per class: 8 * dim bytes.
    """
    with ShardSet.open(embeddings.shards_folder) as shard_set:
        require_parent(
            embeddings.folder,
            embeddings.manifest,
            "shards",
            found=shard_set.fingerprint,
            parent=shard_set.folder,
        )
        labels_of_samples = shard_set.labels.copy()
    labels = labels_of_samples[embeddings.ids]
    classes, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    has_company = (sizes >= 2) & (classes >= 0)
    if not has_company.any():
        raise DataError(
            f"{embeddings.folder}: no class has two pictures, so none match. Give --pairs, or another embedding set."
        )
    sums = np.zeros((len(classes), embeddings.dim))
    outer_sum = np.zeros((embeddings.dim, embeddings.dim))
    start = 0
    for block in EmbeddingSource(embeddings).blocks():
        own = places[start : start + len(block.ids)]
        start += len(block.ids)
        is_kept = has_company[own]
        vectors = block.vectors[is_kept].astype(np.float64)
        outer_sum += vectors.T @ vectors
        np.add.at(sums, own[is_kept], vectors)
    kept_sums = sums[has_company] / np.sqrt(sizes[has_company])[:, None]
    within = outer_sum - kept_sums.T @ kept_sums
    num_pictures, num_classes = int(sizes[has_company].sum()), int(has_company.sum())
    counts = {"num_classes": num_classes, "num_pictures_of_classes": num_pictures}
    return PairMoments(2 * within / (num_pictures - num_classes), counts)


def _read_pairs(path: Path) -> Int64[ndarray, "pairs 2"]:
    try:
        pairs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}.") from error
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(f"{path}: expected two ids per row, found {pairs.dtype} of shape {pairs.shape}.")
    return pairs.astype(np.int64)


def _sha256(pairs: Int64[ndarray, "pairs 2"]) -> str:
    return hashlib.sha256(pairs.tobytes()).hexdigest()
