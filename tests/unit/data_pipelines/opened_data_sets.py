"""Miniatures of data sets, opened as the commands open them."""

from pathlib import Path

from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.registry import open_data_set
from tests.unit.data_pipelines.small_shards import SMALL_SHARDS


def shards_of(name: str, root: Path, *overrides: str, **settings) -> ShardSet:
    written = SMALL_SHARDS.model_copy(update=settings)
    return write_shards(open_data_set(name, root, overrides), root / "shards", written)


def listed(name: str, root: Path, *overrides: str) -> list[tuple[str, str, str | None]]:
    return [(p.split, p.key, p.label) for p in open_data_set(name, root, overrides).pictures()]
