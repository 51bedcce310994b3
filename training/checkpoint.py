"""Checkpoints: a usable encoder and everything needed to resume to the same bits, published atomically."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookalike.artifacts import Manifest, publishing, read_manifest, verify_files, write_manifest
from lookalike.encoder import Encoder, read_weights, write_encoder
from lookalike.errors import ArtifactError, DamagedArtifact

CHECKPOINT_KIND = "checkpoint"
CHECKPOINT_VERSION = 1
_ENCODER_FOLDER = "encoder"
_STATE_NAME = "training_state.pt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    step: int  # optimizer steps done
    weights: dict[str, Tensor]  # of the encoder that would be embedded with
    state: dict[str, Any]  # all else


def save_checkpoint(
    run: Path, encoder: Encoder, state: dict[str, Any], *, step: int, identity: str, num_kept: int
) -> Path:
    """Publishes encoder and state after `step` optimizer steps and removes all but the last `num_kept` checkpoints.

    Args:
        encoder: Stored as an encoder artifact, ready to embed with.
        state: What else a resumed run needs: tensors, numbers and plain containers of them.
        identity: Fingerprint of settings and data; a resume with another one is refused.
    """
    folder = _folder(run, step)
    # Later checkpoints are damaged ones that were passed over: the run went on from before them.
    for later in [other for other in _folders(run) if _step_of(other) > step]:
        shutil.rmtree(later)
    with publishing(folder, replace=True) as temporary:
        (temporary / _ENCODER_FOLDER).mkdir()
        write_encoder(encoder, temporary / _ENCODER_FOLDER)
        torch.save(state, temporary / _STATE_NAME)
        details = {"step": step, "identity": identity}
        write_manifest(temporary, Manifest(CHECKPOINT_KIND, CHECKPOINT_VERSION, details=details))
    for old in _folders(run)[:-num_kept]:
        shutil.rmtree(old)
    return folder


def load_newest_checkpoint(run: Path, *, identity: str) -> Checkpoint | None:
    """The newest whole checkpoint, or None where a run begins.

    A damaged checkpoint is passed over with a warning; older ones are tried.

    Raises:
        ArtifactError: the run folder belongs to other settings or data, or to a newer version of this program.
    """
    for folder in reversed(_folders(run)):
        try:
            manifest = read_manifest(folder, kind=CHECKPOINT_KIND, newest_version=CHECKPOINT_VERSION)
            verify_files(folder, manifest)
        except DamagedArtifact as error:
            logger.warning("passing over checkpoint %s: %s", folder, error)
            continue
        if manifest.details["identity"] != identity:
            raise ArtifactError(
                f"{run} holds a run with other settings or data. Choose another run folder, or remove this one."
            )
        return Checkpoint(
            step=manifest.details["step"],
            weights=read_weights(folder / _ENCODER_FOLDER),
            state=torch.load(folder / _STATE_NAME, weights_only=True, map_location="cpu"),
        )
    return None


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
