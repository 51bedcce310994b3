"""`lookalike evaluate`: embedding sets on the pictures' own classes, or anybody's descriptors on a benchmark."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lookalike.console import new_app, print_result, run_command
from lookalike.errors import SettingsError

app = new_app("Measure retrieval quality.")
_COMMANDS = ("leave-one-out", "descriptors", "compare")


@app.command()
def leave_one_out(
    embedding_sets: Annotated[
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
        embedding_sets, index_folder=index, with_raw_pixels=raw_pixels, ks=parse_ks(ks), out=out
    )
    print_result(summary, as_json=as_json, lines=lambda: lines)


def parse_ks(text: str) -> tuple[int, ...]:
    try:
        ks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1:
        raise SettingsError(f"--ks {text!r} is not a list of positive numbers such as 1,5,10.")
    return ks


@app.command()
def descriptors(
    benchmark: Annotated[
        Literal["roxford5k", "rparis6k", "labels"], typer.Option(help="Whose protocol; `labels` is leave-one-out.")
    ],
    queries: Annotated[Path, typer.Option(help=".npy of the queries' descriptors, rows of floats.")],
    ground_truth: Annotated[Path | None, typer.Option(help="Official gnd_*.pkl or .json of the benchmark.")] = None,
    database: Annotated[Path | None, typer.Option(help=".npy of the database, in the ground truth's order.")] = None,
    distractors: Annotated[
        list[Path] | None, typer.Option(help=".npy of pictures relevant to nobody; may be given again.")
    ] = None,
    query_labels: Annotated[Path | None, typer.Option(help="With `labels`: .npy of one whole number per row.")] = None,
    ties: Annotated[
        Literal["index", "optimistic", "pessimistic"],
        typer.Option(help="Where pictures of equal score stand."),
    ] = "index",
    ks: Annotated[str, typer.Option(help="With `labels`: the k of R@k, comma-separated.")] = "1,5,10",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers there; - prints them.")] = None,
) -> None:
    """Judge descriptors from any program by the official protocol, exact with millions of distractors."""
    from evaluation.descriptors import evaluate_labelled_files, evaluate_revisited_files

    prints_json = json_file is not None and str(json_file) == "-"
    out = None if prints_json else json_file
    if benchmark == "labels":
        _require_options(benchmark, needed={"--query-labels": query_labels}, unused={"--ground-truth": ground_truth})
        assert query_labels is not None
        tree, lines = evaluate_labelled_files(vectors=queries, labels=query_labels, ks=parse_ks(ks), out=out)
    else:
        needed = {"--ground-truth": ground_truth, "--database": database}
        _require_options(benchmark, needed=needed, unused={"--query-labels": query_labels})
        assert ground_truth is not None
        assert database is not None
        tree, lines = evaluate_revisited_files(
            benchmark,
            ground_truth=ground_truth,
            queries=queries,
            database=database,
            distractors=distractors or [],
            ties=ties,
            out=out,
        )
    print_result(tree, as_json=prints_json, lines=lambda: lines)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Folder of an evaluation, or the JSON of `evaluate descriptors`.")],
    after: Annotated[Path, typer.Argument(help="Likewise, of the same queries.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two results query by query: difference, 95% interval, wins and losses, and what is within noise."""
    from evaluation.compare import compare as compare_results

    tree, lines = compare_results(before, after)
    print_result(tree, as_json=as_json, lines=lambda: lines)


def _require_options(benchmark: str, *, needed: dict[str, Path | None], unused: dict[str, Path | None]) -> None:
    for option, value in needed.items():
        if value is None:
            raise SettingsError(f"--benchmark {benchmark} needs {option}.")
    for option, value in unused.items():
        if value is not None:
            raise SettingsError(f"--benchmark {benchmark} does not use {option}.")


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m evaluation") -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `lookalike evaluate EMBEDDINGS` is short for `lookalike evaluate leave-one-out EMBEDDINGS`.
    if given and given[0] not in (*_COMMANDS, "--help"):
        given.insert(0, "leave-one-out")
    run_command(app, given, program=program)


if __name__ == "__main__":
    main()
