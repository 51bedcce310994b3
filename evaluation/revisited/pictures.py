"""The ground truth's pictures: where they are in shards, in a server's index, and in the official folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from data_pipelines.sources import SourcePicture, safe_keys
from data_pipelines.sources.registry import open_data_set
from evaluation.live_server import PictureQuery
from evaluation.revisited.ground_truth import GroundTruth
from lookalike.errors import DataError


def keys_in_shards(names: Sequence[str], *, split: str) -> list[str]:
    """Keys under which `lookalike data write` stores pictures of these names."""
    return [f"{split}/{key}" for key in safe_keys([f"{name}.jpg" for name in names])]


def rows_in_shards(names: Sequence[str], shard_set: ShardSet, *, split: str) -> Int64[ndarray, "names"]:
    """The sample id of each name.

    Raises:
        DataError: pictures that the ground truth names are not in the shards; the first are named.
    """
    rows = shard_set.rows(split)
    row_of_key = dict(zip(shard_set.samples["key"].take(rows).to_pylist(), rows.tolist(), strict=True))
    keys = keys_in_shards(names, split=split)
    missing = [name for name, key in zip(names, keys, strict=True) if key not in row_of_key]
    if missing:
        raise DataError(
            f"{shard_set.folder} lacks {len(missing)} of {len(names)} pictures that the ground truth names in the "
            f"split {split}, first {', '.join(missing[:3])}. `lookalike data verify` says what the folder lacks."
        )
    return np.array([row_of_key[key] for key in keys], np.int64)


def queries_in_folder(benchmark: str, folder: Path, truth: GroundTruth) -> list[PictureQuery]:
    """Whole query pictures with the region that counts, from the official folder, in the ground truth's order.

    Raises:
        DataError: the folder is incomplete.
    """
    listed = {picture.key: picture for picture in open_data_set(benchmark, folder).pictures()}
    return [
        _query(name, listed[key])
        for name, key in zip(truth.query_names, keys_in_shards(truth.query_names, split="query"), strict=True)
    ]


def _query(name: str, picture: SourcePicture) -> PictureQuery:
    return PictureQuery(name, picture.path.read_bytes, picture.box)
