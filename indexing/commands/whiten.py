"""`lookalike index whiten`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from indexing.commands.options import AsJson
from lookalike.console import print_result
from lookalike.encoder_settings import WhiteningSettings
from lookalike.settings import validate_settings


def whiten(
    embeddings: Annotated[Path, typer.Option(help="Embedding set to fit to; not of the pictures that will be judged.")],
    out: Annotated[Path, typer.Option(help="Folder of the new encoder: the set's own, with the whitening behind it.")],
    method: Annotated[
        str, typer.Option(help="pca, or learned from matching pairs: pictures of one class, or --pairs.")
    ] = "pca",
    pairs: Annotated[
        Path | None, typer.Option(help="With learned: .npy of ids that match, two per row; classes where absent.")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Dimensions kept; all that vary where absent.")] = None,
    shrinkage: Annotated[
        float, typer.Option(help="0 to 1: how far variances are drawn to their mean; for few pictures.")
    ] = 0.0,
    power: Annotated[
        float, typer.Option(help="Of the variance that directions are divided by; 0.5 whitens in full.")
    ] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Fit a whitening to an embedding set, and publish its encoder with the whitening as part of it.

    The same one that is there already is kept.
    """
    tree = {"method": method, "dim": dim, "shrinkage": shrinkage, "power": power}
    settings = validate_settings(WhiteningSettings, tree, where="options of index whiten")
    from indexing.embedding_set import EmbeddingSet
    from indexing.whiten import publish_whitened_encoder
    from lookalike.native_libraries import load_torch, num_cores

    load_torch(num_threads=num_cores())
    encoder = publish_whitened_encoder(EmbeddingSet.open(embeddings), out, settings, pairs=pairs)
    assert encoder.whitening is not None
    result: dict[str, Any] = {"encoder": str(out), "dim": encoder.dim, **encoder.whitening.fitted_on}
    print_result(result, as_json=as_json)
