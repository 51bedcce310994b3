"""Small pictures on disk, and shard sets made of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders

SMALL_SHARDS = ShardSettings(max_shard_bytes=4 << 10)


def write_picture(path: Path, seed: int, *, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).save(path)


def write_class_folders(root: Path, images_of_class: Mapping[str, int]) -> Path:
    seed = 0
    for name, num_images in images_of_class.items():
        for index in range(num_images):
            write_picture(root / name / f"{index:02d}.jpg", seed, size=(40 + seed % 5, 30 + seed % 7))
            seed += 1
    return root


def write_small_shards(source: Path, folder: Path, **settings) -> ShardSet:
    return write_shards(ClassFolders(ClassFoldersSettings(folder=source, **settings)), folder, SMALL_SHARDS)
