"""`lookalike train CONFIG [key=value ...]`, alone or under torchrun."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from lookalike.console import new_app, print_result, run_command
from lookalike.settings import dump_settings, load_settings
from training.settings import TrainSettings

app = new_app("Train an encoder.")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML settings, e.g. configs/train/....yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, e.g. optimizer.lr=1e-4")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check and print the resolved settings and the plan, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train an encoder on shards.

    The run folder collects checkpoints, events and at the end the encoder; the same command resumes a run that was
    interrupted. Several processes: torchrun --nproc-per-node N -m training CONFIG.
    """
    settings = load_settings(TrainSettings, config, overrides or [])
    if dry_run:
        _print_plan(settings, as_json=as_json)
        return
    from lookalike.collectives import process_group
    from lookalike.native_libraries import load_torch, num_cores
    from lookalike.world import World
    from training.loop import train as run_training

    world = World.detect()
    load_torch(num_threads=settings.num_threads or world.share_of_cores(num_cores()))
    with process_group(world):
        encoder = run_training(settings, world=world)
    if world.is_first:
        print_result({"run": str(settings.run), "encoder": str(encoder), "steps": settings.num_steps}, as_json=as_json)


def _print_plan(settings: TrainSettings, *, as_json: bool) -> None:
    from data_pipelines.shard_set import ShardSet
    from lookalike.world import World
    from training.loop import plan_batches

    with ShardSet.open(settings.shards, cache=settings.shard_cache) as shard_set:
        num_steps_per_epoch = plan_batches(settings, shard_set, World.detect()).num_steps_per_epoch
    plan = {
        "images_per_step": settings.batch.num_images,
        "steps": settings.num_steps,
        "epochs": round(settings.num_steps / num_steps_per_epoch, 2),
    }
    tree = dump_settings(settings)
    print_result(
        {"plan": plan, "settings": tree}, as_json=as_json, lines=lambda: [yaml.safe_dump(tree), yaml.safe_dump(plan)]
    )


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m training") -> None:
    run_command(app, arguments, program=program)


if __name__ == "__main__":
    main()
