"""`lookalike evaluate`: embedding sets, a benchmark from shards or through a server, anybody's descriptors."""

import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lookalike.console import new_app, print_result, run_command
from lookalike.errors import SettingsError

if TYPE_CHECKING:
    from evaluation.outputs import Outputs
    from lookalike.world import World

app = new_app("Measure retrieval quality.")

Ks = Annotated[str | None, typer.Option(help="The k of hit_rate@k and recall@k, comma-separated.")]
Ties = Annotated[
    Literal["index", "optimistic", "pessimistic"], typer.Option(help="Where pictures of equal score stand.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the numbers there; - prints them.")]
Report = Annotated[Path | None, typer.Option(help="Folder for an HTML report, the numbers, and rows to quote.")]
Previous = Annotated[
    list[Path] | None, typer.Option(help="Earlier result of the same queries, to compare with; may be given again.")
]
GroundTruth = Annotated[Path | None, typer.Option(help="Official gnd_*.pkl, .mat or .json of Oxford or Paris.")]
Solution = Annotated[Path | None, typer.Option(help="Official retrieval_solution_v2.1.csv of Google Landmarks.")]
GallerySplit = Annotated[str | None, typer.Option(help="Split of the gallery, if not the benchmark's own.")]
QuerySplit = Annotated[str | None, typer.Option(help="Split of the queries; classes: they search the gallery split.")]
Depth = Annotated[
    int, typer.Option(min=1, help="Hits asked of an index or a server at most, beyond those that the k need.")
]


@app.command()
def leave_one_out(
    embedding_sets: Annotated[
        list[Path], typer.Argument(help="Embedding sets of the same pictures; the last is compared.")
    ],
    index: Annotated[
        Path | None, typer.Option(help="Rank the last embedding set by this index instead of by brute force.")
    ] = None,
    raw_pixels: Annotated[bool, typer.Option(help="Also show what comparing pixels would do.")] = False,
    ks: Ks = None,
    out: Annotated[Path | None, typer.Option(help="Folder for an HTML report, the numbers, and rows to quote.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let every picture search all others, and count how often pictures of its class come first."""
    from evaluation.embedding_sets import evaluate_embedding_sets

    summary, lines = evaluate_embedding_sets(
        embedding_sets, index_folder=index, with_raw_pixels=raw_pixels, ks=parse_ks(ks) or (1, 5, 10), out=out
    )
    print_result(summary, as_json=as_json, lines=lambda: lines)


@app.command()
def run(
    benchmark: Annotated[
        str,
        typer.Argument(help="sop, cars196, cub200, inat2018, vehicleid_800, classes, roxford5k, rparis6k, gldv2..."),
    ],
    shards: Annotated[Path, typer.Option(help="Shard set with the benchmark's splits, see `data write`.")],
    out: Annotated[Path, typer.Option(help="Folder for embeddings, which a rerun goes on from, and numbers.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run folder of a training, one of its checkpoints, or an encoder.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Instead: a timm model with its pretrained weights, or `lite0` from its package.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="With --pretrained: side of the pictures, in pixels.")] = 224,
    changed_input: Annotated[
        list[str] | None,
        typer.Option("--input", help="What the encoder sees, as key=value: max_side=1024, 'scales=[1, 0.7071]'."),
    ] = None,
    index: Annotated[Path | None, typer.Option(help="Rank by this index instead of by brute force.")] = None,
    depth: Depth = 10_000,
    ground_truth: GroundTruth = None,
    distractors: Annotated[
        Path | None, typer.Option(help="Oxford, Paris: shard set of distractors, such as r1m.")
    ] = None,
    solution: Solution = None,
    gallery_split: GallerySplit = None,
    query_split: QuerySplit = None,
    training_shards: Annotated[
        Path | None, typer.Option(help="Shards that the encoder learned from: warns of classes and pictures in both.")
    ] = None,
    ks: Ks = None,
    ties: Ties = "index",
    report: Annotated[bool, typer.Option(help="Also write OUT/report with pictures of the failures.")] = True,
    previous: Previous = None,
    as_json: AsJson = False,
) -> None:
    """Embed a benchmark's pictures and judge the encoder, alone or under torchrun."""
    from evaluation.benchmarks import find_benchmark
    from evaluation.run import RunOptions, evaluate_run, open_encoder

    given = dict(locals())
    if (checkpoint is None) == (pretrained is None):
        raise SettingsError("give either --checkpoint or --pretrained.")
    chosen = find_benchmark(benchmark, ks=parse_ks(ks), gallery_split=gallery_split, query_split=query_split)
    _refuse(run, given, ["ties" if index else "depth"], where="with --index" if index else "without --index")
    _refuse(run, given, ["image_size"] if checkpoint else [], where="with --checkpoint")
    options = RunOptions(out, ties, index, depth, ground_truth, distractors, solution, training_shards)
    outputs = _outputs(out / "result.json", out / "report" if report else None, previous)
    with _processes() as world:
        from data_pipelines.shard_set import ShardSet
        from lookalike.encoder import with_input

        encoder = with_input(open_encoder(checkpoint, pretrained, image_size=image_size), changed_input or ())
        with ShardSet.open(shards) as shard_set:
            tree, lines = evaluate_run(chosen, encoder, shard_set, options, outputs, world=world)
        _print_from_first(world, tree, as_json=as_json, lines=lambda: lines)


@app.command()
def url(
    address: Annotated[str, typer.Argument(help="Where the server's page is, such as http://127.0.0.1:8000/.")],
    benchmark: Annotated[str, typer.Argument(help="As of `run`.")],
    key: Annotated[
        str | None,
        typer.Option(help="API key, for servers that want one.", envvar="LOOKALIKE_API_KEY", show_envvar=True),
    ] = None,
    shards: Annotated[Path | None, typer.Option(help="Shard set that the server's index was made from.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Oxford, Paris: the official folder; whole pictures are sent with their region.")
    ] = None,
    ground_truth: GroundTruth = None,
    solution: Solution = None,
    gallery_split: GallerySplit = None,
    query_split: QuerySplit = None,
    exact: Annotated[bool, typer.Option(help="Let the server compare with every vector.")] = False,
    depth: Depth = 10_000,
    connections: Annotated[int, typer.Option(min=1, help="Queries under way at a time.")] = 4,
    offline: Annotated[Path | None, typer.Option(help="Result computed offline: prints the difference.")] = None,
    ks: Ks = None,
    json_file: JsonFile = None,
    report: Report = None,
    previous: Previous = None,
) -> None:
    """Judge a running server by its own answers, over the same HTTP API that its users call."""
    from evaluation.benchmarks import find_benchmark
    from evaluation.url import UrlOptions, evaluate_url

    given = dict(locals())
    chosen = find_benchmark(benchmark, ks=parse_ks(ks), gallery_split=gallery_split, query_split=query_split)
    unused = {
        "classes": ["folder", "ground_truth", "solution"],
        "landmarks": ["solution"],
        "retrieval": ["folder", "ground_truth", "depth"],
    }
    _refuse(url, given, unused[chosen.kind], where=f"for {benchmark}")
    options = UrlOptions(address, shards, folder, ground_truth, solution, exact, depth, connections, offline, key)
    tree, lines = evaluate_url(chosen, options, _outputs(_file(json_file), report, previous))
    print_result(tree, as_json=_prints(json_file), lines=lambda: lines)


@app.command()
def descriptors(
    benchmark: Annotated[
        Literal["roxford5k", "rparis6k", "labels"], typer.Option(help="Whose protocol; `labels` is any with classes.")
    ],
    queries: Annotated[
        Path | None, typer.Option(help="Queries' vectors: .npy, .mat, embedding set or index; a row each.")
    ] = None,
    database: Annotated[
        Path | None, typer.Option(help="Likewise of the database, in the ground truth's order.")
    ] = None,
    ground_truth: GroundTruth = None,
    distractors: Annotated[
        list[Path] | None, typer.Option(help="Vectors of pictures relevant to nobody; may be given again.")
    ] = None,
    rankings: Annotated[
        Path | None,
        typer.Option(help="Instead of vectors: .npy of ranked rows per query, -1 where there are no more."),
    ] = None,
    num_distractors: Annotated[int, typer.Option(min=0, help="Distractors that --rankings were made among.")] = 0,
    query_labels: Annotated[Path | None, typer.Option(help="labels: .npy of one whole number per row.")] = None,
    database_labels: Annotated[Path | None, typer.Option(help="labels: likewise of the database.")] = None,
    query_ids: Annotated[Path | None, typer.Option(help="labels: .npy of ids; one id is one picture.")] = None,
    database_ids: Annotated[Path | None, typer.Option(help="labels: likewise of the database.")] = None,
    protocol: Annotated[
        Literal["leave-one-out", "random-gallery"],
        typer.Option(help="labels without a database: all others are the gallery, or one random picture per class."),
    ] = "leave-one-out",
    num_seeds: Annotated[int, typer.Option(min=1, help="Of random-gallery.")] = 10,
    nmi: Annotated[bool, typer.Option(help="labels: also the normalised mutual information.")] = False,
    ties: Ties = "index",
    ks: Ks = None,
    json_file: JsonFile = None,
    report: Report = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder of the official .jpg files, for the report.")] = None,
    previous: Previous = None,
) -> None:
    """Judge vectors or rankings of any program, exact with millions of distractors, alone or under torchrun."""
    given = dict(locals())
    outputs = _outputs(_file(json_file), report, previous)
    if benchmark == "labels":
        used = ["queries", "query_labels", "query_ids", "ties", "ks", "nmi"]
        used += ["database", "database_labels", "database_ids"] if database else ["protocol"]
        used += ["num_seeds"] if protocol == "random-gallery" else []
        _require(given, ["queries", "query_labels", *(["database_labels"] if database else [])], benchmark)
        evaluate = _labels(queries, query_labels, database, database_labels, query_ids, database_ids)
        keywords: dict[str, Any] = {
            "protocol": "query_gallery" if database else protocol.replace("-", "_"),
            "ks": parse_ks(ks) or (1, 5, 10),
            "num_seeds": num_seeds,
            "with_nmi": nmi,
            "ties": ties,
        }
    elif rankings:
        used = ["ground_truth", "rankings", "num_distractors"]
        _require(given, ["ground_truth"], benchmark)
        evaluate = _landmarks(benchmark, ground_truth, None, None, None, rankings, num_distractors, None)
        keywords = {}
    else:
        used = ["ground_truth", "queries", "database", "distractors", "ties", *(["pictures"] if report else [])]
        _require(given, ["ground_truth", "queries", "database"], benchmark)
        evaluate = _landmarks(benchmark, ground_truth, queries, database, distractors, None, 0, pictures)
        keywords = {"ties": ties}
    used += ["benchmark", "json_file", "report", "previous"]
    _refuse(descriptors, given, [name for name in given if name not in used], where="here")
    with _processes() as world:
        tree, lines = evaluate(outputs, world=world, **keywords)
        _print_from_first(world, tree, as_json=_prints(json_file), lines=lambda: lines)


@app.command()
def submission(
    task: Annotated[Literal["retrieval", "recognition"], typer.Argument(help="Of Google Landmarks v2.")],
    solution: Annotated[Path, typer.Option(help="Official *_solution_v2.1.csv.")],
    predictions: Annotated[Path, typer.Option(help="Submission in the official format.")],
    json_file: JsonFile = None,
    report: Report = None,
    previous: Previous = None,
) -> None:
    """Score an official submission of Google Landmarks v2: mAP@100, or GAP."""
    from evaluation.gldv2.evaluate import evaluate_submission

    tree, lines = evaluate_submission(
        task, solution=solution, predictions=predictions, outputs=_outputs(_file(json_file), report, previous)
    )
    print_result(tree, as_json=_prints(json_file), lines=lambda: lines)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON of a result, or the folder of a report.")],
    after: Annotated[Path, typer.Argument(help="Likewise, of the same queries.")],
    as_json: AsJson = False,
) -> None:
    """Compare two results query by query: difference, 95% interval, wins and losses, and what is within noise."""
    from evaluation.compare import compare as compare_results

    tree, lines = compare_results(before, after)
    print_result(tree, as_json=as_json, lines=lambda: lines)


def parse_ks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        ks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1:
        raise SettingsError(f"--ks {text!r} is not a list of positive numbers such as 1,5,10.")
    return ks


def _labels(
    queries: Path | None,
    query_labels: Path | None,
    database: Path | None,
    database_labels: Path | None,
    query_ids: Path | None,
    database_ids: Path | None,
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    from evaluation.descriptors import LabelFiles, evaluate_label_files

    assert queries is not None
    assert query_labels is not None
    files = LabelFiles(queries, query_labels, database, database_labels, query_ids, database_ids)
    return lambda outputs, **keywords: evaluate_label_files(files, outputs, **keywords)


def _landmarks(
    benchmark: Literal["roxford5k", "rparis6k"],
    ground_truth: Path | None,
    queries: Path | None,
    database: Path | None,
    distractors: Sequence[Path] | None,
    rankings: Path | None,
    num_distractors: int,
    pictures: Path | None,
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    from evaluation.descriptors import LandmarkFiles, evaluate_landmark_files

    assert ground_truth is not None
    files = LandmarkFiles(
        ground_truth, queries, database, tuple(distractors or ()), rankings, num_distractors, pictures
    )
    return lambda outputs, **keywords: evaluate_landmark_files(benchmark, files, outputs, **keywords)


def _require(given: Mapping[str, Any], names: Sequence[str], benchmark: str) -> None:
    for name in names:
        if given[name] is None:
            raise SettingsError(f"--benchmark {benchmark} needs {_option(name)}.")


def _refuse(command: Callable[..., None], given: Mapping[str, Any], names: Sequence[str], *, where: str) -> None:
    """Raises SettingsError where one of these options of a command is not as by default: it would have no effect."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    for name in names:
        if given[name] != defaults[name]:
            raise SettingsError(f"{_option(name)} has no effect {where}.")


def _option(name: str) -> str:
    return f"--{name.removesuffix('_file').replace('_', '-')}"


def _outputs(json_file: Path | None, report: Path | None, previous: list[Path] | None) -> "Outputs":
    from evaluation.outputs import Outputs

    return Outputs(json_file, report, tuple(previous or ()), _command())


def _command() -> str:
    """As it was typed, for whoever wants the result again."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["evaluate"] else sys.argv[1:]
    return shlex.join(["lookalike", "evaluate", *arguments])


def _file(json_file: Path | None) -> Path | None:
    return None if _prints(json_file) else json_file


def _prints(json_file: Path | None) -> bool:
    return json_file is not None and str(json_file) == "-"


@contextmanager
def _processes() -> "Iterator[World]":
    """This process's place among those of torchrun, and its share of the cores."""
    from lookalike.collectives import process_group
    from lookalike.native_libraries import load_torch, num_cores
    from lookalike.world import World

    world = World.detect()
    load_torch(num_threads=world.share_of_cores(num_cores()))
    with process_group(world):
        yield world


def _print_from_first(world: "World", tree: dict[str, Any], **options: Any) -> None:
    if world.is_first:
        print_result(tree, **options)


_COMMANDS = ("leave-one-out", "run", "url", "descriptors", "submission", "compare")


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m evaluation") -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `lookalike evaluate EMBEDDINGS` is short for `lookalike evaluate leave-one-out EMBEDDINGS`.
    if given and given[0] not in (*_COMMANDS, "--help"):
        given.insert(0, "leave-one-out")
    run_command(app, given, program=program)


if __name__ == "__main__":
    main()
