"""The baseline without any learning: small pictures compared pixel by pixel."""

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from data_pipelines.loader import evaluation_batches
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import EvaluationTransform
from lookalike.encoder_settings import InputSettings


def raw_pixel_vectors(
    shard_set: ShardSet, split: str | None, *, size: int = 32
) -> tuple[Float32[ndarray, "pictures dim"], Int64[ndarray, "pictures"]]:
    """Unit vectors of `3 * size * size` pixel values, each picture's mean removed, and the pictures' ids."""
    transform = EvaluationTransform(InputSettings(size=size, interpolation="bilinear"))
    pixels, rows = [], []
    for name in shard_set.shards_of(split):
        for batch in evaluation_batches(shard_set, name, transform, batch_size=512):
            pixels.append(np.asarray(batch.pixels, np.float32).reshape(len(batch.rows), 3 * size * size))
            rows.append(np.asarray(batch.rows, np.int64))
    vectors = np.concatenate(pixels)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return vectors, np.concatenate(rows)
