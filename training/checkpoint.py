"""Checkpoints: encoder and everything needed to resume to the same bits, published atomically."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from lookalike.artifacts import Manifest, publishing, read_manifest, verify_files, write_manifest
from lookalike.errors import ArtifactError

CHECKPOINT_KIND = "checkpoint"
CHECKPOINT_VERSION = 1
_STATE_NAME = "training_state.pt"

logger = logging.getLogger(__name__)


def save_checkpoint(run: Path, state: dict[str, Any], *, step: int, identity: str, num_kept: int) -> Path:
    """Publishes the state after `step` optimizer steps and removes all but the last `num_kept` checkpoints.

    Args:
        state: Tensors, numbers and plain containers of them.
        identity: Fingerprint of settings and data; a resume with another one is refused.
    """
    folder = _folder(run, step)
    # A step is repeated when the newest checkpoint was damaged and the run went on from an older one.
    with publishing(folder, replace=True) as temporary:
        torch.save(state, temporary / _STATE_NAME)
        details = {"step": step, "identity": identity}
        write_manifest(temporary, Manifest(CHECKPOINT_KIND, CHECKPOINT_VERSION, details=details))
    for old in _folders(run)[:-num_kept]:
        shutil.rmtree(old)
    return folder


def load_newest_checkpoint(run: Path, *, identity: str) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint, or None where a run begins.

    A damaged checkpoint is passed over with a warning; older ones are tried.

    Raises:
        ArtifactError: the run folder belongs to other settings or data.
    """
    for folder in reversed(_folders(run)):
        try:
            manifest = read_manifest(folder, kind=CHECKPOINT_KIND, newest_version=CHECKPOINT_VERSION)
            verify_files(folder, manifest)
        except ArtifactError as error:
            logger.warning("passing over checkpoint %s: %s", folder, error)
            continue
        if manifest.details["identity"] != identity:
            raise ArtifactError(
                f"{run} holds a run with other settings or data. Choose another run folder, or remove this one."
            )
        state: dict[str, Any] = torch.load(folder / _STATE_NAME, weights_only=True, map_location="cpu")
        return state
    return None


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"))
