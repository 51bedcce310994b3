"""A small index of foreign vectors, and what a live index over it holds."""

import json
from pathlib import Path

import numpy as np
from numpy import ndarray

from indexing.building.build import build_index
from indexing.living.live_index import LiveIndex
from indexing.living.live_view import LiveView
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource

DIM = 16
NUM_VECTORS = 40


def unit(seed: int, dim: int = DIM) -> ndarray:
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def units(*seeds: int, dim: int = DIM) -> ndarray:
    return np.stack([unit(seed, dim) for seed in seeds])


def build(folder: Path, *, first_seed: int = 0, first_id: int = 0, dim: int = DIM) -> str:
    """A version in which id `first_id + n` has the vector `unit(first_seed + n)`."""
    source = folder.parent / f"source-{first_seed}-{first_id}-{dim}"
    source.mkdir(exist_ok=True, parents=True)
    np.save(source / "vectors.npy", units(*range(first_seed, first_seed + NUM_VECTORS), dim=dim))
    np.save(source / "ids.npy", np.arange(first_id, first_id + NUM_VECTORS))
    return build_index(
        ArraySource(source / "vectors.npy", source / "ids.npy"), folder, IndexSettings(type="Flat")
    ).version


def content(index: LiveIndex | LiveView) -> dict[int, tuple[bytes, str]]:
    """id -> vector and key."""
    ids = index.ids()
    rows = index.metadata_of(ids)
    return {
        int(i): (vector.tobytes(), json.dumps(row))
        for i, vector, row in zip(ids, index.vectors_of(ids), rows, strict=True)
    }


def change(live: LiveIndex) -> None:
    live.add(units(700, 701, 702), [{"key": "a"}, {"key": "b"}, {}])
    live.delete([3, 41])
    live.replace([5], units(703), [{"key": "five"}])
