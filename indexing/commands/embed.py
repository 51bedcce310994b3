"""`lookalike embed`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipelines.settings import ShardCacheSettings
from indexing.commands.options import AsJson, SettingsFile
from indexing.settings import EmbedSettings
from lookalike.console import print_result
from lookalike.errors import SettingsError
from lookalike.settings import apply_overrides, load_settings, validate_settings

_IMAGE_SIZE = 224  # of a pretrained network


def embed(
    shards: Annotated[str, typer.Argument(help="Shard set: a folder, or an address such as s3://bucket/shards.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of this step as key=value, such as precision=bfloat16.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the new embedding set.")],
    encoder: Annotated[Path | None, typer.Option(help="Encoder folder, e.g. RUN/encoder of a training run.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Instead: a timm model with its pretrained weights, or `lite0` from its package.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="With --pretrained: side of the pictures, in pixels; 224 where absent.")
    ] = None,
    changed_input: Annotated[
        list[str] | None,
        typer.Option("--input", help="What the encoder sees, as key=value: max_side=1024, 'scales=[1, 0.7071]'."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split; all where absent.")] = None,
    shard_cache: Annotated[
        Path | None, typer.Option(help="Folder on this machine that keeps shards of an address.")
    ] = None,
    settings_file: SettingsFile = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would be embedded, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed the pictures of a shard set; run it again to continue after an interruption. Works under torchrun."""
    if (encoder is None) == (pretrained is None):
        raise SettingsError("give either --encoder or --pretrained.")
    if encoder is not None and image_size is not None:
        raise SettingsError("--image-size belongs to --pretrained; --input size=N changes that of an encoder.")
    if "://" in shards and shard_cache is None:
        raise SettingsError(f"{shards} is read through a local cache: give --shard-cache.")
    cache = ShardCacheSettings(folder=shard_cache) if shard_cache else None
    settings = (
        load_settings(EmbedSettings, settings_file, overrides or ())
        if settings_file
        else validate_settings(EmbedSettings, apply_overrides({}, overrides or ()), where=" ".join(overrides or ()))
    )
    from data_pipelines.shard_set import ShardSet
    from indexing.embed import embed_shards
    from lookalike.collectives import process_group
    from lookalike.encoder import create_pretrained_encoder, load_encoder, with_input
    from lookalike.native_libraries import load_torch, num_cores
    from lookalike.world import World

    world = World.detect()
    load_torch(num_threads=world.share_of_cores(num_cores()))
    with ShardSet.open(shards, cache=cache) as shard_set, process_group(world):
        if dry_run:
            plan = {
                "pictures": len(shard_set.rows(split)),
                "split": split or "all",
                "out": str(out),
                "ranks": world.size,
            }
            print_result(plan, as_json=as_json)
            return
        model = (
            load_encoder(encoder)
            if encoder
            else create_pretrained_encoder(str(pretrained), image_size=image_size or _IMAGE_SIZE)
        )
        model = with_input(model, changed_input or ())
        embeddings = embed_shards(model, shard_set, out, split=split, settings=settings, world=world)
    if world.is_first:
        details = embeddings.manifest.details
        result: dict[str, Any] = {
            "embeddings": str(out),
            "vectors": details["num_vectors"],
            "dim": details["dim"],
            "skipped": details["num_skipped"],
        }
        print_result(result, as_json=as_json)
