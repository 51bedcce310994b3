"""`lookalike train CONFIG [key=value ...]`, alone or under torchrun."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from lookalike.console import new_app, print_result, run_command
from lookalike.settings import dump_settings, load_settings
from training.settings import TrainSettings

if TYPE_CHECKING:
    from lookalike.world import World

app = new_app("Train an encoder, and report on runs.")


@app.command("run")
def train(
    config: Annotated[Path, typer.Argument(help="YAML settings, e.g. configs/train/....yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, e.g. optimizer.lr=1e-4")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check and print the resolved settings and the plan, and stop.")
    ] = False,
    check_settings: Annotated[
        bool,
        typer.Option(help="Check what needs no data, and stop, as `lookalike launch` does before it starts processes."),
    ] = False,
    verify_gradients: Annotated[
        bool,
        typer.Option(
            help="Compare the gradient of all processes with that of one on a small first batch, and stop; "
            "exit code 1 unless they agree."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train an encoder on shards.

    The run folder collects checkpoints, events and at the end the encoder; the same command resumes a run that was
    interrupted. Several processes: lookalike launch --nproc-per-node N lookalike train CONFIG.
    """
    settings = load_settings(TrainSettings, config, overrides or [])
    if check_settings:
        _check(settings)
        return
    if dry_run:
        _check(settings)
        _print_plan(settings, as_json=as_json)
        return
    with _processes(settings) as world:
        if verify_gradients:
            _verify_gradients(settings, world, as_json=as_json)
            return
        from training.loop import train as run_training

        encoder = run_training(settings, world=world, command=_command())
    if world.is_first:
        from training.reporting.comparison import write_table
        from training.reporting.curves import write_curves

        places = {"encoder": encoder, "curves": write_curves(settings.run), "table": write_table(settings.run)}
        print_result(
            {"run": str(settings.run), **{name: str(place) for name, place in places.items()}}, as_json=as_json
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not; several are put side by side.")],
    out: Annotated[Path | None, typer.Option(help="Folder for a page with curves, and the numbers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how runs went, what sets them apart, and means over seeds."""
    from training.reporting.page import report_runs

    tree, lines = report_runs(runs, out)
    print_result(tree, as_json=as_json, lines=lambda: lines)


@contextmanager
def _processes(settings: TrainSettings) -> "Iterator[World]":
    """This process's place among those of torchrun, and its share of the cores."""
    from lookalike.collectives import process_group
    from lookalike.native_libraries import load_torch, num_cores
    from lookalike.world import World

    world = World.detect()
    load_torch(num_threads=settings.num_threads or world.share_of_cores(num_cores()))
    with process_group(world):
        yield world


def _verify_gradients(settings: TrainSettings, world: "World", *, as_json: bool) -> None:
    from training.verify_run import verify_run

    checks = verify_run(settings, world=world)
    have_passed = all(check.has_passed for check in checks)
    if world.is_first:
        tree = {"have_passed": have_passed, "checks": [asdict(check) for check in checks]}
        print_result(tree, as_json=as_json, lines=lambda: [line for check in checks for line in check.lines()])
    if not have_passed:
        raise typer.Exit(1)


def _check(settings: TrainSettings) -> None:
    """Refuses what a run would refuse that needs no data, but is more than the settings know of."""
    from lookalike.encoder import require_known_backbone

    require_known_backbone(settings.encoder.backbone)


def _print_plan(settings: TrainSettings, *, as_json: bool) -> None:
    from data_pipelines.shard_set import ShardSet
    from lookalike.world import World
    from training.dry_run import plan_of_run
    from training.loop import create_validator
    from training.run_length import plan_batches, with_num_steps

    with ShardSet.open(settings.shards, cache=settings.shard_cache) as shard_set:
        num_steps_per_epoch = plan_batches(settings, shard_set, World.detect()).num_steps_per_epoch
        create_validator(settings, shard_set, World.detect())  # refuses what validation could not look at
    settings = with_num_steps(settings, num_steps_per_epoch=num_steps_per_epoch)
    plan = plan_of_run(settings, num_steps_per_epoch=num_steps_per_epoch)
    tree = dump_settings(settings)
    print_result(
        {"plan": plan, "settings": tree}, as_json=as_json, lines=lambda: [yaml.safe_dump(tree), yaml.safe_dump(plan)]
    )


def _command() -> str:
    """As it was typed, for whoever wants the run again."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:]
    return shlex.join(["lookalike", "train", *arguments])


_COMMANDS = ("run", "report")


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m training") -> None:
    run_command(app, _with_command(sys.argv[1:] if arguments is None else arguments), program=program)


def check(arguments: Sequence[str], *, program: str) -> None:
    """Ends this process, with message and exit code, where `main` would refuse `arguments` before it reads data."""
    given = _with_command(arguments)
    if given[:1] != ["run"]:
        return
    try:
        run_command(app, ["run", "--check-settings", *given[1:]], program=program)
    except SystemExit as end:
        if end.code:
            raise


def _with_command(arguments: Sequence[str]) -> list[str]:
    """`lookalike train CONFIG` is short for `lookalike train run CONFIG`."""
    is_short = arguments and arguments[0] not in (*_COMMANDS, "--help")
    return ["run", *arguments] if is_short else list(arguments)


if __name__ == "__main__":
    main()
