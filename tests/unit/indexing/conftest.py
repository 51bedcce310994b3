from pathlib import Path

import pytest
import torch

from data_pipelines.shard_set import ShardSet
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings


@pytest.fixture(scope="session")
def embeddings(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSet:
    torch.manual_seed(0)
    settings = EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32))
    with ShardSet.open(shards_folder) as shard_set:
        return embed_shards(create_encoder(settings), shard_set, tmp_path_factory.mktemp("embeddings") / "e")
