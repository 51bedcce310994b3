"""`lookalike evaluate EMBEDDINGS [EMBEDDINGS ...]`: leave-one-out retrieval on the pictures' own classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lookalike.console import new_app, print_result, run_command

app = new_app("Measure retrieval quality.")


@app.command()
def evaluate(
    embeddings: Annotated[
        list[Path], typer.Argument(help="Embedding sets of the same pictures; the last is compared.")
    ],
    index: Annotated[
        Path | None, typer.Option(help="Rank the last embedding set by this index instead of by brute force.")
    ] = None,
    raw_pixels: Annotated[bool, typer.Option(help="Also show what comparing pixels would do.")] = False,
    ks: Annotated[str, typer.Option(help="The k of R@k, comma-separated.")] = "1,5,10",
    out: Annotated[Path | None, typer.Option(help="Folder for numbers, values per query and an HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Let every picture search all others, and count how often pictures of its class come first."""
    from evaluation.run import evaluate_embedding_sets

    summary, lines = evaluate_embedding_sets(
        embeddings, index_folder=index, with_raw_pixels=raw_pixels, ks=parse_ks(ks), out=out
    )
    print_result(summary, as_json=as_json, lines=lambda: lines)


def parse_ks(text: str) -> tuple[int, ...]:
    from lookalike.errors import SettingsError

    try:
        ks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1:
        raise SettingsError(f"--ks {text!r} is not a list of positive numbers such as 1,5,10.")
    return ks


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m evaluation") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
