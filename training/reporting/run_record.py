"""`run.json`: what made a run, from what, on which machine; one entry for each time it was started."""

import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_pipelines.shard_set import ShardSet
from lookalike.artifacts import versions, write_text_atomically
from lookalike.native_libraries import num_cores
from lookalike.world import World

RECORD_NAME = "run.json"
_FORMAT_VERSION = 1

logger = logging.getLogger(__name__)


def record_start(
    run: Path,
    shard_set: ShardSet,
    *,
    identity: str,
    recipe: str,
    step: int,
    world: World,
    device: torch.device,
    command: str,
) -> None:
    """Adds a start to the record of a run; for the first rank. A record that cannot be written is warned about.

    Args:
        identity: Of the run, see `run_identity`.
        recipe: The identity that it would have with seed 0: runs of one recipe differ by their seed alone.
        step: Steps done before this start.
        command: That started it, as one could type it again.
    """
    with explaining_never_fails("run record"):
        run.mkdir(parents=True, exist_ok=True)
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "command": command,
            "world_size": world.size,
            "device": device_name(device),
            "versions": versions(),
        }
        tree = {
            "format_version": _FORMAT_VERSION,
            "identity": identity,
            "recipe": recipe,
            "shards": {
                "fingerprint": shard_set.fingerprint,
                "folder": str(shard_set.folder.absolute()),
                "num_samples": shard_set.num_samples,
            },
            "starts": [*read_record(run).get("starts", []), start],
        }
        write_text_atomically(run / RECORD_NAME, json.dumps(tree, indent=2) + "\n")


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run; empty where there is none, or none that can be read."""
    try:
        tree = json.loads((run / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def device_name(device: torch.device) -> str:
    """Of the GPU, or the kind of processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {num_cores()} cores, {platform.machine()}"


@contextmanager
def explaining_never_fails(what: str) -> Iterator[None]:
    """Turns any error of a block into a warning: what describes a run must not end it."""
    try:
        yield
    except Exception as error:
        logger.warning("%s was not written: %s: %s", what, type(error).__name__, error)
