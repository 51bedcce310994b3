"""Whose run a folder holds: the run's identity, its description, and refusals of another run's folder."""

from pathlib import Path
from typing import Any

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
_NUM_NAMED = 5


def run_identity(settings: TrainSettings, shard_set: ShardSet) -> str:
    """Fingerprint of the settings and data that decide what is trained.

    Where files lie, how fast they are read and how memory is used is left out, and so are the back end and the number
    of threads and processes: a run may go on with others, but the last bits of its weights then differ.
    """
    return fingerprint({"settings": _with_effect(dump_settings(settings)), "shards": shard_set.fingerprint})


def _with_effect(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that decide nothing of what is trained."""
    rest = {name: value for name, value in tree.items() if name not in _NAMES_WITHOUT_EFFECT}
    batch = {name: value for name, value in tree["batch"].items() if name not in _BATCH_NAMES_WITHOUT_EFFECT}
    return {**rest, "batch": batch}


def describe_run(settings: TrainSettings, identity: str, *, batch: BatchSettings) -> None:
    """Writes the resolved settings into the run folder.

    Args:
        batch: With the chunks that were chosen.
    """
    settings = settings.model_copy(update={"batch": batch})
    settings.run.mkdir(parents=True, exist_ok=True)
    text = f"# Resolved settings of this run, identity {identity}\n{yaml.safe_dump(dump_settings(settings))}"
    write_text_atomically(settings.run / "settings.yaml", text)


def difference_to_run(run: Path, settings: TrainSettings) -> str:
    """What a run in the folder has other than these settings say, for people."""
    try:
        theirs = yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
        ours = dump_settings(settings)
        if settings.batch.chunk_size == "auto":
            theirs["batch"]["chunk_size"] = "auto"  # a run's description has what was chosen
        there, here = _by_path(_with_effect(theirs)), _by_path(_with_effect(ours))
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return "other settings or data"
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if not names:
        return "other data"
    changes = [f"{name} {there.get(name)} (now {here.get(name)})" for name in names[:_NUM_NAMED]]
    return f"other settings: {', '.join(changes)}{', ...' if len(names) > _NUM_NAMED else ''}"


def _by_path(tree: dict[str, Any]) -> dict[str, Any]:
    """`optimizer.lr` -> value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _by_path(value) if isinstance(value, dict) else {}
        flat.update({f"{name}.{key}": one for key, one in inner.items()} if inner else {name: value})
    return flat


def require_same_start(run: Path, step: int | None, world: World) -> None:
    """Raises ArtifactError on every rank unless all stand at the same step, or all see a finished run (None)."""
    own = torch.tensor([-1 if step is None else step], device=available_device())
    steps = all_gather_rows(own, world).tolist()
    if len(set(steps)) > 1:
        raise ArtifactError(
            f"the processes see different states of {run} (steps {sorted(set(steps))}, -1 for finished). "
            "The run folder must lie on storage that all of them share."
        )


def require_same_run(run: Path, identity: str, settings: TrainSettings) -> None:
    """Raises ArtifactError unless the finished run in the folder is the one with this identity."""
    read_manifest(run / "encoder", kind=ENCODER_KIND, newest_version=ENCODER_VERSION)
    description = run / "settings.yaml"
    if not description.exists():
        raise ArtifactError(f"{run} holds an encoder but no training run. Choose another run folder.")
    first_line = description.read_text(encoding="utf-8").partition("\n")[0]
    if not first_line.endswith(identity):
        raise ArtifactError(
            f"{run} holds a finished run with {difference_to_run(run, settings)}. Choose another run folder."
        )
