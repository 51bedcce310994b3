"""`lookalike index load-milvus`."""

from pathlib import Path
from typing import Annotated, cast

import typer

from indexing.commands.options import AsJson
from lookalike.console import print_result
from lookalike.errors import SettingsError


def load_milvus(
    uri: Annotated[
        str, typer.Option(help="Address of Milvus, e.g. http://host:19530, or a local file NAME.db for milvus-lite.")
    ],
    collection: Annotated[str, typer.Option(help="Name of the collection; it is made where it does not exist.")],
    embeddings: Annotated[Path | None, typer.Option(help="Embedding set, made by `lookalike embed`.")] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="Instead: vectors of another program, as .npy or Parquet.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="With --vectors: their ids, as .npy or Parquet.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="With --vectors: a Parquet row for each.")] = None,
    normalize: Annotated[bool, typer.Option(help="With --vectors: scale them to unit length.")] = False,
    type_name: Annotated[
        str, typer.Option("--type", help="Flat, IVF<partitions>,<Flat|SQ8|RaBitQ>, or HNSW<links>[,SQ8].")
    ] = "Flat",
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the exact nearest that searches find by default.")
    ] = 0.99,
    at: Annotated[int, typer.Option(min=1, max=1000, help="How many of the exact nearest --recall speaks of.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Load vectors and metadata into a Milvus collection; run it again to continue after an interruption."""
    if (embeddings is None) == (vectors is None):
        raise SettingsError("give either --embeddings or --vectors.")
    if embeddings is not None and (ids or metadata or normalize):
        raise SettingsError("--ids, --metadata and --normalize belong to --vectors; an embedding set has its own.")
    from indexing.index_types import IndexType

    index_type = IndexType.parse(type_name)
    from indexing.searching.milvus_loading import load_into_milvus
    from indexing.sources import open_source
    from indexing.sources.arrays import ArraySource

    source = (
        ArraySource(vectors, ids, metadata, normalize=normalize) if vectors else open_source(cast(Path, embeddings))
    )
    with load_into_milvus(source, uri, collection, index_type, recall=recall, at=at) as searcher:
        about = searcher.facts.properties
        result = {
            "collection": str(searcher.collection),
            "vectors": searcher.num_vectors,
            "dim": searcher.dim,
            "type": about.index_type.name,
            "columns": [column.name for column in about.columns],
            "recall_curve": about.curve.to_list(),
        }
    print_result(result, as_json=as_json)
