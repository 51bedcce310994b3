"""Whose run a folder holds: the run's identity, its description, and refusals of another run's folder."""

from pathlib import Path

import torch
import yaml

from data_pipelines.shard_set import ShardSet
from lookalike.artifacts import fingerprint, read_manifest, write_text_atomically
from lookalike.collectives import all_gather_rows
from lookalike.encoder import ENCODER_KIND, ENCODER_VERSION, available_device
from lookalike.errors import ArtifactError
from lookalike.settings import dump_settings
from lookalike.world import World
from training.settings import BatchSettings, TrainSettings

# Settings that say where things lie, how fast they are read and who looks on.
_NAMES_WITHOUT_EFFECT = (
    "run",
    "shards",
    "shard_cache",
    "num_workers",
    "steps_per_checkpoint",
    "num_kept_checkpoints",
    "num_threads",
    "tensorboard",
    "writes_checkpoints_in_background",
    "backend",
)
# Of `batch`: how much memory may be used, not what is computed.
_BATCH_NAMES_WITHOUT_EFFECT = ("num_kept_chunks", "memory_budget")


def run_identity(settings: TrainSettings, shard_set: ShardSet) -> str:
    """Fingerprint of the settings and data that decide what is trained.

    Where files lie, how fast they are read and how memory is used is left out, and so are the back end and the number
    of threads and processes: a run may go on with others, but the last bits of its weights then differ.
    """
    tree = dump_settings(settings)
    for name in _NAMES_WITHOUT_EFFECT:
        del tree[name]
    for name in _BATCH_NAMES_WITHOUT_EFFECT:
        del tree["batch"][name]
    return fingerprint({"settings": tree, "shards": shard_set.fingerprint})


def describe_run(settings: TrainSettings, identity: str, *, batch: BatchSettings) -> None:
    """Writes the resolved settings into the run folder.

    Args:
        batch: With the chunks that were chosen.
    """
    settings = settings.model_copy(update={"batch": batch})
    settings.run.mkdir(parents=True, exist_ok=True)
    text = f"# Resolved settings of this run, identity {identity}\n{yaml.safe_dump(dump_settings(settings))}"
    write_text_atomically(settings.run / "settings.yaml", text)


def require_same_start(run: Path, step: int | None, world: World) -> None:
    """Raises ArtifactError on every rank unless all stand at the same step, or all see a finished run (None)."""
    own = torch.tensor([-1 if step is None else step], device=available_device())
    steps = all_gather_rows(own, world).tolist()
    if len(set(steps)) > 1:
        raise ArtifactError(
            f"the processes see different states of {run} (steps {sorted(set(steps))}, -1 for finished). "
            "The run folder must lie on storage that all of them share."
        )


def require_same_run(run: Path, identity: str) -> None:
    """Raises ArtifactError unless the finished run in the folder is the one with this identity."""
    read_manifest(run / "encoder", kind=ENCODER_KIND, newest_version=ENCODER_VERSION)
    description = run / "settings.yaml"
    if not description.exists():
        raise ArtifactError(f"{run} holds an encoder but no training run. Choose another run folder.")
    first_line = description.read_text(encoding="utf-8").partition("\n")[0]
    if not first_line.endswith(identity):
        raise ArtifactError(f"{run} holds a finished run with other settings or data. Choose another run folder.")
