"""Vectors, labels and ids of any origin: `.npy`, `.mat`, embedding sets and published indexes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int64, Integer
from numpy import ndarray

from data_pipelines.sources.mat_files import read_mat
from indexing.embedding_set import EmbeddingSet, block_path
from indexing.published_index import PublishedIndex
from indexing.versions import versions_of
from lookalike.artifacts import file_sha256
from lookalike.errors import DataError

# What the vectors are for; the official example features hold both, a picture per column.
Role = Literal["queries", "database"]
_MAT_VARIABLES: dict[Role, str] = {"queries": "Q", "database": "X"}
_LARGEST_HASHED_BYTES = 256 << 20


def load_vectors(path: Path, *, role: Role = "database", name: str | None = None) -> Float[ndarray, "vectors dim"]:
    """All vectors of a file or folder, a row each; of an artifact in the order of their ids.

    `.npy` and an index are memory-mapped. An embedding set of several blocks is copied to memory; see
    `load_vector_parts`.

    Args:
        role: Decides which variable of a `.mat` is read: Q for queries, X for all else, or the only one that fits.
        name: Of the variable, whatever the role.

    Raises:
        DataError: it cannot be read, or holds something else.
        ArtifactError: a folder is no embedding set and no index, or is damaged.
    """
    parts = load_vector_parts(path, role=role, name=name)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load_vector_parts(
    path: Path, *, role: Role = "database", name: str | None = None
) -> list[Float[ndarray, "part dim"]]:
    """Like `load_vectors`, but an embedding set stays on disk, a memory-mapped array per block."""
    if name is not None and path.suffix.lower() != ".mat":
        raise DataError(f"{path} has no variables, so none is called {name}; only a .mat has.")
    if _is_index(path):
        return [PublishedIndex.open(path).store.vectors]
    if path.is_dir():
        return _embedding_parts(EmbeddingSet.open(path))
    if path.suffix.lower() == ".mat":
        return [_mat_vectors(path, role, name)]
    return [_require_rows_of_floats(_load_npy(path), path)]


def load_labels(path: Path) -> Integer[ndarray, "rows"]:
    """A `.npy` of one whole number per row.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    labels = _load_npy(path)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: expected one whole number per row, found {labels.dtype} of shape {labels.shape}.")
    return labels


def load_rankings(path: Path) -> Int64[ndarray, "queries depth"]:
    """A `.npy` of whole numbers, a list per query, best first; -1 where there are no more.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    rankings = _load_npy(path)
    if rankings.ndim != 2 or not np.issubdtype(rankings.dtype, np.integer):
        raise DataError(
            f"{path}: expected whole numbers, a row per query, found {rankings.dtype} of shape {rankings.shape}."
        )
    return rankings.astype(np.int64)


def load_ids(path: Path) -> Int64[ndarray, "rows"]:
    """Ids of the rows: of an artifact its own in the order of `load_vectors`, or a `.npy` of whole numbers.

    Raises:
        DataError: it cannot be read, holds something else, or an id is negative or there twice.
        ArtifactError: a folder is no embedding set and no index, or is damaged.
    """
    if _is_index(path):
        return PublishedIndex.open(path).ids()
    ids = np.sort(EmbeddingSet.open(path).ids) if path.is_dir() else load_labels(path).astype(np.int64)
    if (ids < 0).any():
        raise DataError(f"{path} holds the id {int(ids.min())}; ids are not negative.")
    values, times = np.unique(ids, return_counts=True)
    if (times > 1).any():
        raise DataError(f"{path} holds the id {int(values[times > 1][0])} more than once.")
    return ids


def provenance(path: Path, parts: Sequence[Float[ndarray, "_ dim"]]) -> dict[str, Any]:
    """What a record says of vectors: name, type, shape, and what identifies them where that is cheap.

    That is the fingerprint of an artifact, and the SHA-256 of a file below 256 MiB.

    Args:
        parts: What was loaded from `path`: `[load_vectors(path)]` or `load_vector_parts(path)`.
    """
    dtype = parts[0].dtype if parts else np.dtype(np.float32)
    shape = [sum(map(len, parts)), parts[0].shape[1] if parts else 0]
    record: dict[str, Any] = {"file": path.name, "dtype": str(dtype), "shape": shape}
    if _is_index(path):
        index = PublishedIndex.open(path)
        return {**record, "version": index.version, "fingerprint": index.fingerprint}
    if path.is_dir():
        return {**record, "fingerprint": EmbeddingSet.open(path).fingerprint}
    return {**record, "sha256": file_sha256(path)} if path.stat().st_size < _LARGEST_HASHED_BYTES else record


def _is_index(path: Path) -> bool:
    return path.is_dir() and bool(versions_of(path))


def _embedding_parts(embeddings: EmbeddingSet) -> list[Float[ndarray, "part dim"]]:
    files = [block_path(embeddings.folder, name, "npy") for name in embeddings.manifest.details["blocks"]]
    parts = [_require_rows_of_floats(_load_npy(file), file) for file in files]
    parts = [part for part in parts if len(part)]
    ids = embeddings.ids
    if sum(map(len, parts)) != len(ids):
        raise DataError(f"{embeddings.folder} holds {sum(map(len, parts))} vectors and {len(ids)} ids. Embed again.")
    if not parts:
        return [np.zeros((0, embeddings.dim), np.float32)]
    if (np.diff(ids) > 0).all():
        return parts
    return [np.concatenate(parts)[np.argsort(ids, kind="stable")]]


def _mat_vectors(path: Path, role: Role, name: str | None) -> Float[ndarray, "vectors dim"]:
    contents = {key: np.asarray(value) for key, value in read_mat(path).items()}
    fitting = [key for key, value in contents.items() if np.issubdtype(value.dtype, np.floating) and value.ndim == 2]
    wanted = name or _MAT_VARIABLES[role]
    if name is None and wanted not in contents and len(fitting) == 1:
        [wanted] = fitting
    if wanted not in contents:
        found = ", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in contents.items()) or "nothing"
        raise DataError(f"{path}: expected the variable {wanted} with a picture per column, found {found}.")
    columns = contents[wanted]
    if columns.ndim == 1:
        columns = columns[:, None]  # one picture: its axis of length 1 was removed
    return _require_rows_of_floats(columns.T, path)


def _load_npy(path: Path) -> ndarray:
    try:
        array: ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}.") from error
    if not isinstance(array, ndarray):
        raise DataError(f"{path} holds several arrays; save one as .npy.")
    return array


def _require_rows_of_floats(array: ndarray, path: Path) -> Float[ndarray, "rows dim"]:
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path}: expected rows of floats, found {array.dtype} of shape {array.shape}.")
    return array
