from pathlib import Path

import torch

from data_pipelines.shard_set import ShardSet
from indexing.embed import embed_shards
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks

ENCODER = EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32))


def embed(world: World, shards_folder: Path, folder: Path) -> tuple[str, bytes]:
    torch.manual_seed(0)
    with ShardSet.open(shards_folder) as shard_set:
        embeddings = embed_shards(create_encoder(ENCODER), shard_set, folder, world=world)
    return embeddings.fingerprint, embeddings.vectors().tobytes()


def test_ranks_make_the_very_bytes_of_one_process(shards_folder: Path, tmp_path: Path) -> None:
    [alone] = run_on_ranks(embed, 1, shards_folder, tmp_path / "alone")
    on_two = run_on_ranks(embed, 2, shards_folder, tmp_path / "two")
    assert on_two == [alone, alone]
