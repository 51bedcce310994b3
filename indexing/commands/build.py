"""`lookalike index build`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from indexing.commands.describe import summary, summary_lines
from indexing.commands.options import AsJson
from indexing.settings import IndexSettings
from lookalike.console import print_result
from lookalike.errors import SettingsError
from lookalike.settings import validate_settings

if TYPE_CHECKING:
    from indexing.vector_source import VectorSource


def build(
    out: Annotated[Path, typer.Option(help="Folder of the index; a new version is published in it.")],
    embeddings: Annotated[Path | None, typer.Option(help="Embedding set, made by `lookalike embed`.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Instead: vectors of another program, .npy or Parquet.")] = None,
    ids: Annotated[
        Path | None, typer.Option(help="With --vectors: their 64-bit ids, .npy or Parquet; else row numbers.")
    ] = None,
    metadata: Annotated[Path | None, typer.Option(help="With --vectors: Parquet, one row per vector.")] = None,
    normalize: Annotated[bool, typer.Option(help="With --vectors: scale them to unit length.")] = False,
    recall: Annotated[float, typer.Option(help="Share of the exact nearest that searches must find.")] = 0.99,
    at: Annotated[int, typer.Option(help="How many of the exact nearest --recall speaks of.")] = 10,
    ram: Annotated[str | None, typer.Option(help="Memory that searches may occupy, such as 2GiB.")] = None,
    latency: Annotated[str | None, typer.Option(help="Time that one query may take, such as 5ms.")] = None,
    mode: Annotated[
        str, typer.Option(help="single, batch or evaluation: how queries come, see the documentation.")
    ] = "single",
    index_type: Annotated[
        str, typer.Option("--type", help="auto, Flat, IVF<partitions>,<Flat|SQfp16|SQ8|RaBitQ> or HNSW<links>[,SQ8].")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    accept_nearest: Annotated[
        bool, typer.Option(help="Where the wishes cannot all be kept, build the nearest index that is possible.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print the plan and stop; the vectors read for it are kept for the build.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Plan, build, measure and publish an index; run it again to continue after an interruption. Works under torchrun.

    Exit code 4 where the wishes cannot all be kept; the nearest possible plan is printed, and nothing is built.
    """
    wishes = {
        "type": index_type,
        "recall": recall,
        "at": at,
        "ram": ram,
        "latency": latency,
        "mode": mode,
        "seed": seed,
    }
    settings = validate_settings(IndexSettings, wishes, where="options of index build")
    source = _open_source(embeddings, vectors, ids, metadata, normalize=normalize)
    from indexing.building.build import build_index, plan_build
    from indexing.planning.report import plan_lines
    from lookalike.collectives import process_group
    from lookalike.errors import ResourceError
    from lookalike.native_libraries import load_torch, num_cores
    from lookalike.world import World

    if dry_run:
        plan = plan_build(source, out, settings)
        print_result(plan.to_tree(), as_json=as_json, lines=lambda: plan_lines(plan))
        if not (plan.is_reachable or accept_nearest):
            raise ResourceError("These wishes cannot all be kept.")
        return
    world = World.detect()
    load_torch(num_threads=world.share_of_cores(num_cores()))
    with process_group(world):
        index = build_index(source, out, settings, accepts_nearest=accept_nearest, world=world)
    if world.is_first:
        result: dict[str, Any] = {"index": str(out), **summary(index)}
        print_result(result, as_json=as_json, lines=lambda: summary_lines(result))


def _open_source(
    embeddings: Path | None, vectors: Path | None, ids: Path | None, metadata: Path | None, *, normalize: bool
) -> "VectorSource":
    if (embeddings is None) == (vectors is None):
        raise SettingsError("give either --embeddings or --vectors.")
    if embeddings is not None:
        if ids or metadata or normalize:
            raise SettingsError("--ids, --metadata and --normalize belong to --vectors; an embedding set has its own.")
        from indexing.sources import open_source

        return open_source(embeddings)
    from indexing.sources.arrays import ArraySource

    assert vectors is not None
    return ArraySource(vectors, ids, metadata, normalize=normalize)
