"""`lookalike index check`."""

from pathlib import Path
from typing import Annotated

import typer

from indexing.commands.options import AsJson
from lookalike.console import print_result


def check(
    index: Annotated[Path, typer.Argument(help="Index folder.")],
    version: Annotated[str | None, typer.Option(help="This version; the current one where absent.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Shard set with the pictures, if it was moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find damage: changed bytes, wrong ids, swapped metadata, a foreign encoder. Exit code 5 names what is wrong."""
    from indexing.index_check import check_index
    from indexing.versions import current_version, details_of

    version = version or current_version(index)
    details_of(index, version)  # names the versions there are, if this is none of them
    found = list(check_index(index, version, shards=shards))
    result = {"index": str(index), "version": version, "in_order": found}
    print_result(result, as_json=as_json, lines=lambda: [f"{version} is in order:", *(f"  {line}" for line in found)])
