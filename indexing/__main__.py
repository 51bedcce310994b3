"""Commands: embed, build, describe, search."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipelines.settings import ShardCacheSettings
from indexing.settings import EmbedSettings, IndexSettings
from lookalike.console import new_app, print_result, run_command
from lookalike.errors import SettingsError
from lookalike.settings import load_settings, validate_settings

app = new_app("Pictures -> vectors -> a searchable index.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="YAML file with settings of this step.")]


@app.command()
def embed(
    shards: Annotated[str, typer.Argument(help="Shard set: a folder, or an address such as s3://bucket/shards.")],
    out: Annotated[Path, typer.Option(help="Folder of the new embedding set.")],
    encoder: Annotated[Path | None, typer.Option(help="Encoder folder, e.g. RUN/encoder of a training run.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Instead: a timm model with its pretrained weights, or `lite0` from its package.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="With --pretrained: side of the pictures, in pixels.")] = 224,
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
    if "://" in shards and shard_cache is None:
        raise SettingsError(f"{shards} is read through a local cache: give --shard-cache.")
    cache = ShardCacheSettings(folder=shard_cache) if shard_cache else None
    settings = load_settings(EmbedSettings, settings_file) if settings_file else EmbedSettings()
    from data_pipelines.shard_set import ShardSet
    from indexing.embed import embed_shards
    from lookalike.collectives import process_group
    from lookalike.encoder import create_pretrained_encoder, load_encoder
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
        model = load_encoder(encoder) if encoder else create_pretrained_encoder(str(pretrained), image_size=image_size)
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


@app.command()
def build(
    embeddings: Annotated[Path, typer.Option(help="Embedding set, made by `lookalike embed`.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; a new version is published in it.")],
    index_type: Annotated[str, typer.Option("--type", help="auto, Flat, or IVF<partitions>,Flat.")] = "auto",
    recall: Annotated[float, typer.Option(help="Share of the exact 10 nearest that searches must find.")] = 0.99,
    dry_run: Annotated[bool, typer.Option(help="Print what would be built, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an index from an embedding set, measure its recall, and publish it as the current version."""
    settings = validate_settings(
        IndexSettings, {"type": index_type, "target_recall": recall}, where="options of index build"
    )
    from indexing.embedding_set import EmbeddingSet

    embedding_set = EmbeddingSet.open(embeddings)
    if dry_run:
        from indexing.faiss_index import choose_type

        num_vectors = int(embedding_set.manifest.details["num_vectors"])
        plan = {
            "type": choose_type(num_vectors, settings),
            "vectors": num_vectors,
            "mebibytes": round(4 * num_vectors * embedding_set.dim / 2**20, 1),
            "out": str(out),
        }
        print_result(plan, as_json=as_json)
        return
    from indexing.build import build_index

    index = build_index(embedding_set, out, settings)
    print_result({"index": str(out), **_summary(index)}, as_json=as_json)


@app.command()
def describe(
    index: Annotated[Path, typer.Argument(help="Index folder.")],
    check: Annotated[bool, typer.Option(help="Also compare every file with its checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what an index holds and how well it searches."""
    from indexing.published_index import PublishedIndex, versions_of

    opened = PublishedIndex.open(index)
    if check:
        opened.check()
    print_result({"index": str(index), "versions": versions_of(index), **_summary(opened)}, as_json=as_json)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Index folder.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures to search with.")],
    k: Annotated[int, typer.Option(min=1, help="Number of answers per picture.")] = 10,
    exact: Annotated[bool, typer.Option(help="Compare with every vector.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the nearest pictures of an index, best first."""
    from indexing.picture_search import search_with_pictures
    from indexing.published_index import PublishedIndex
    from lookalike.records import SearchParameters

    answers = search_with_pictures(PublishedIndex.open(index), pictures, SearchParameters(k=k, exact=exact))
    print_result(
        {"answers": answers},
        as_json=as_json,
        lines=lambda: [
            line
            for answer in answers
            for line in [
                f"{answer['picture']}:",
                *(
                    f"{position:>4}  {hit['score']:.4f}  {hit['key']}  {hit['class_name'] or ''}"
                    for position, hit in enumerate(answer["hits"], start=1)
                ),
            ]
        ],
    )


def _summary(index: Any) -> dict[str, Any]:
    details = index.manifest.details
    names = ("type", "num_vectors", "dim", "default_num_probes", "recall_curve")
    return {"version": index.version, **{name: details[name] for name in names}}


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m indexing") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
