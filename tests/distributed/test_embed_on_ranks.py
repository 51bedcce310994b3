from pathlib import Path

import torch

from data_pipelines.shard_set import ShardSet
from indexing.embed import embed_shards
from indexing.settings import EmbedSettings
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks

ENCODER = EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32))


def embed(world: World, shards_folder: Path, folder: Path) -> list[tuple[str, bytes]]:
    # As the command does: processes share the machine's cores.
    torch.set_num_threads(4 // world.size)
    results = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        settings = EmbedSettings(batch_size=7, precision=precision)
        with ShardSet.open(shards_folder) as shard_set:
            embeddings = embed_shards(
                create_encoder(ENCODER), shard_set, folder / precision, settings=settings, world=world
            )
        results.append((embeddings.fingerprint, embeddings.vectors().tobytes()))
    return results


def test_ranks_make_the_very_bytes_of_one_process(shards_folder: Path, tmp_path: Path) -> None:
    [alone] = run_on_ranks(embed, 1, shards_folder, tmp_path / "alone")
    on_two = run_on_ranks(embed, 2, shards_folder, tmp_path / "two")
    assert on_two == [alone, alone]
    assert alone[0] != alone[1]
