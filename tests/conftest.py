"""Fixtures of all tests: small drawn pictures, and shard sets and indexes made from them by the real stages."""

from pathlib import Path

import pytest

from lookalike.native_libraries import set_thread_policy

set_thread_policy()

import torch  # noqa: E402

from data_pipelines.settings import ClassFoldersSettings, ShardSettings  # noqa: E402
from data_pipelines.shard_set import ShardSet  # noqa: E402
from data_pipelines.shard_writer import write_shards  # noqa: E402
from data_pipelines.sources.class_folders import ClassFolders  # noqa: E402
from tests.drawn_pictures import draw_class_folders  # noqa: E402

# Test processes run side by side and their tensors are small: one thread each is fastest.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with 6 classes of 5 pictures each."""
    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    draw_class_folders(folder / "train", range(6), pictures_per_class=5)
    draw_class_folders(folder / "test", range(6, 12), pictures_per_class=5)
    return folder


@pytest.fixture(scope="session")
def shards_folder(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    settings = ShardSettings(max_shard_bytes=8_000)  # several shards per split
    write_shards(ClassFolders(ClassFoldersSettings(folder=picture_folder)), folder, settings).close()
    return folder


@pytest.fixture
def shard_set(shards_folder: Path) -> ShardSet:
    return ShardSet.open(shards_folder)
