import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_pipelines.shard_set import ShardSet
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.living.live_index import LiveIndex
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from tests.small_index import build


@pytest.fixture(scope="session")
def embeddings(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSet:
    torch.manual_seed(0)
    settings = EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32))
    with ShardSet.open(shards_folder) as shard_set:
        return embed_shards(create_encoder(settings), shard_set, tmp_path_factory.mktemp("embeddings") / "e")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small index with ids 0 to 39, made once; tests change their own copy, `folder`."""
    folder = tmp_path_factory.mktemp("built") / "index"
    build(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


@pytest.fixture
def live(folder: Path) -> Iterator[LiveIndex]:
    with closing(LiveIndex.open(folder)) as opened:
        yield opened


@pytest.fixture
def few_measured_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexing.searching.milvus_loading._NUM_MEASURED_QUERIES", 50)
