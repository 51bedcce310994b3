"""Whitening: a linear map after the encoder that decorrelates its output, fitted to vectors or to pairs of them.

Sources: Jegou, Chum 2012, "Negative evidences and co-occurences in image retrieval", section 3 (PCA whitening);
Mikolajczyk, Matas 2007, "Improving descriptors for fast tree matching by optimal linear projection", and
Radenovic, Tolias, Chum 2018, arXiv:1711.02512, section 3.4 (learned from pairs).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from lookalike.artifacts import fingerprint
from lookalike.encoder_settings import WhiteningSettings
from lookalike.errors import ArtifactError, DataError, SettingsError
from lookalike.settings import dump_settings, validate_settings

_ARRAYS_NAME = "whitening.safetensors"
_SETTINGS_NAME = "whitening.json"
# Variances below this share of the largest are rounding noise of float32 vectors, not directions.
_LEAST_RELATIVE_VARIANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Whitening:
    """x -> (x - mean) @ projection, at unit length again."""

    settings: WhiteningSettings
    mean: Float32[Tensor, "dim"]
    projection: Float32[Tensor, "dim whitened_dim"]
    fitted_on: Mapping[str, Any] = field(default_factory=dict)  # fingerprints and counts, for people

    @property
    def dim(self) -> int:
        return int(self.projection.shape[1])

    @property
    def fingerprint(self) -> str:
        """Of the map, not of where it came from."""
        arrays = [array.contiguous().numpy().tobytes() for array in (self.mean, self.projection)]
        return fingerprint([hashlib.sha256(array).hexdigest() for array in arrays])

    def __call__(self, vectors: Float32[Tensor, "batch dim"]) -> Float32[Tensor, "batch whitened_dim"]:
        """Vectors on the CPU; a zero vector, which has no direction, stays zero.

        In double precision, so that a vector's result does not depend on its company in the batch.
        """
        whitened = (vectors.double() - self.mean.double()) @ self.projection.double()
        return (functional.normalize(whitened, dim=1) * vectors.any(dim=1, keepdim=True)).float()

    def write(self, folder: Path) -> None:
        """Adds two files to an encoder's folder."""
        save_file({"mean": self.mean, "projection": self.projection.contiguous()}, folder / _ARRAYS_NAME)
        tree = {"settings": dump_settings(self.settings), "fitted_on": dict(self.fitted_on)}
        (folder / _SETTINGS_NAME).write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Whitening":
        """Of an encoder's folder; raises ArtifactError where it cannot be read."""
        path = folder / _SETTINGS_NAME
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            settings = validate_settings(WhiteningSettings, tree["settings"], where=str(path))
            arrays = load_file(folder / _ARRAYS_NAME)
            return cls(settings, arrays["mean"], arrays["projection"], tree["fitted_on"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(f"the whitening of {folder} cannot be read: {error}.") from error


class VectorMoments:
    """Mean and covariance of vectors that come block by block, in double precision: 8 * dim^2 bytes."""

    def __init__(self, dim: int) -> None:
        self.num_vectors = 0
        self._sum = np.zeros(dim)
        self._outer_sum = np.zeros((dim, dim))

    def add(self, vectors: Float[ndarray, "vectors dim"]) -> None:
        """Copies the block to double precision."""
        exact = vectors.astype(np.float64)
        self.num_vectors += len(exact)
        self._sum += exact.sum(axis=0)
        self._outer_sum += exact.T @ exact

    @property
    def mean(self) -> Float64[ndarray, "dim"]:
        return self._sum / max(self.num_vectors, 1)

    @property
    def covariance(self) -> Float64[ndarray, "dim dim"]:
        """Divided by the number of vectors."""
        return self._outer_sum / max(self.num_vectors, 1) - np.outer(self.mean, self.mean)


def pca_whitening(
    mean: Float64[ndarray, "dim"],
    covariance: Float64[ndarray, "dim dim"],
    settings: WhiteningSettings,
    *,
    fitted_on: Mapping[str, Any],
) -> Whitening:
    """Keeps the directions of largest variance, each divided by its variance to `settings.power`.

    Raises:
        SettingsError: more dimensions are asked for than the vectors have.
        DataError: the vectors do not vary in so many directions.
    """
    variances, directions = _principal(covariance)
    dim = _num_kept(settings, varying=_num_positive(variances), dim=len(mean))
    scales = _shrunk(variances, settings.shrinkage)[:dim] ** -settings.power
    return _whitening(mean, directions[:, :dim] * scales, settings, fitted_on)


def learned_whitening(
    mean: Float64[ndarray, "dim"],
    covariance: Float64[ndarray, "dim dim"],
    pair_covariance: Float64[ndarray, "dim dim"],
    settings: WhiteningSettings,
    *,
    fitted_on: Mapping[str, Any],
) -> Whitening:
    """Whitens how matching pairs differ, then keeps the directions in which all vectors vary most.

    Args:
        mean, covariance: Of all vectors. The source takes the differences of pairs that do not match; among many
            classes they are nearly all pairs, whose covariance is twice this one.
        pair_covariance: Mean outer product of the differences of matching pairs.

    Raises:
        SettingsError: more dimensions are asked for than the vectors have.
        DataError: the pairs do not differ in every direction, and nothing is shrunk; or the vectors do not vary in so
            many directions.
    """
    # Where no vector varies, such as in a feature that is always zero, pairs cannot differ either.
    spread, basis = _principal(covariance)
    varying = _num_positive(spread)
    dim = _num_kept(settings, varying=varying, dim=len(mean))
    basis = basis[:, :varying]
    variances, directions = _principal(basis.T @ pair_covariance @ basis)
    differing = _num_positive(variances)
    if differing == 0 or (differing < varying and settings.shrinkage == 0):
        raise DataError(
            f"whitening: matching pairs differ in {differing} of the {varying} directions in which the vectors vary. "
            "Give more pairs, or a shrinkage above 0."
        )
    whitener = basis @ (directions * _shrunk(variances, settings.shrinkage) ** -settings.power)
    _, rotation = _principal(whitener.T @ covariance @ whitener)
    return _whitening(mean, whitener @ rotation[:, :dim], settings, fitted_on)


def _num_positive(variances: Float64[ndarray, "dim"]) -> int:
    return int((variances > _LEAST_RELATIVE_VARIANCE * max(variances[0], 0)).sum())


def _principal(
    covariance: Float64[ndarray, "dim dim"],
) -> tuple[Float64[ndarray, "dim"], Float64[ndarray, "dim dim"]]:
    """Variances, descending, and their directions as columns."""
    variances, directions = np.linalg.eigh((covariance + covariance.T) / 2)
    variances, directions = variances[::-1], directions[:, ::-1]
    # An eigenvector is one of two; which, depends on the library. Here: the one whose largest part is positive.
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(len(variances))]
    return variances, directions * np.where(largest < 0, -1.0, 1.0)


def _shrunk(variances: Float64[ndarray, "dim"], shrinkage: float) -> Float64[ndarray, "dim"]:
    """Towards their mean, as of (1 - shrinkage) * C + shrinkage * trace(C) / dim * I (Ledoit, Wolf 2004)."""
    variances = np.maximum(variances, 0)
    return (1 - shrinkage) * variances + shrinkage * variances.mean()


def _num_kept(settings: WhiteningSettings, *, varying: int, dim: int) -> int:
    if settings.dim is not None and settings.dim > dim:
        raise SettingsError(f"whitening: dim is {settings.dim}, the vectors have {dim} dimensions.")
    if varying == 0 or (settings.dim or 0) > varying:
        raise DataError(
            f"whitening: the vectors vary in {varying} directions only, so {settings.dim or 'none'} cannot be kept. "
            "Fit it to more pictures, or keep fewer."
        )
    return settings.dim or varying


def _whitening(
    mean: Float64[ndarray, "dim"],
    projection: Float64[ndarray, "dim whitened_dim"],
    settings: WhiteningSettings,
    fitted_on: Mapping[str, Any],
) -> Whitening:
    def as_tensor(array: ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    return Whitening(settings, as_tensor(mean), as_tensor(projection), fitted_on)
