"""Checkpoints: a usable encoder and everything needed to resume to the same bits, published atomically.

The last ones are kept, and the best by validation; each names its validation value in its own manifest, so which one is
the best can be told from the folders alone. `best.json` repeats it for people and scripts.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lookalike.artifacts import (
    Manifest,
    publishing,
    read_manifest,
    verify_files,
    write_manifest,
    write_text_atomically,
)
from lookalike.encoder import Encoder, create_encoder, load_encoder, read_weights, write_encoder
from lookalike.errors import ArtifactError, DamagedArtifact

CHECKPOINT_KIND = "checkpoint"
CHECKPOINT_VERSION = 1
BEST_NAME = "best.json"
_ENCODER_FOLDER = "encoder"
_STATE_NAME = "training_state.pt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    step: int  # optimizer steps done
    weights: dict[str, Tensor]  # of the encoder that would be embedded with
    state: dict[str, Any]  # all else


@dataclass(frozen=True, slots=True)
class BestCheckpoint:
    """The checkpoint of the highest validation value, the earlier one of equal ones."""

    step: int
    value: float
    folder: Path

    def load_encoder(self) -> Encoder:
        """Raises ArtifactError where its bytes are damaged."""
        return load_encoder(self.folder / _ENCODER_FOLDER)


class CheckpointWriter:
    """Saves the checkpoints of a run, for the one process that writes them; a context manager.

    In the background, `save` copies the state to host memory and returns, and a thread writes it while training goes
    on: at most one at a time, with the very bytes of a write in the foreground. The host holds that copy until it is
    written. A process that is killed meanwhile leaves the checkpoint before as it was.
    """

    def __init__(self, run: Path, *, identity: str, num_kept: int, in_background: bool = False) -> None:
        """
        Args:
            identity: Fingerprint of settings and data; a resume with another one is refused.
            num_kept: The last so many stay, and the best.
        """
        self._run, self._identity, self._num_kept = run, identity, num_kept
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_background else None
        self._in_flight: Future[Path] | None = None
        self._encoder_on_host: Encoder | None = None

    def save(self, encoder: Encoder, state: dict[str, Any], *, step: int, validation: float | None = None) -> None:
        """See `save_checkpoint`. In the background the checkpoint before is waited for, and an error of its raised."""
        self.wait()
        if self._pool is None:
            self._publish(encoder, on_host(state), step, validation)
            return
        self._in_flight = self._pool.submit(
            self._publish, self._copy_on_host(encoder), on_host(state), step, validation
        )

    def raise_failure(self) -> None:
        """Raises the error that ended a write in the background, if one did; costs nothing, for every step."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Returns once the checkpoint in flight is published; raises the error that ended it."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            # The error that ended the run is the one to be told.
            logger.warning("the last checkpoint could not be written: %s", failure)
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _publish(self, encoder: Encoder, state: dict[str, Any], step: int, validation: float | None) -> Path:
        return _publish(
            self._run,
            encoder,
            state,
            step=step,
            identity=self._identity,
            num_kept=self._num_kept,
            validation=validation,
        )

    def _copy_on_host(self, encoder: Encoder) -> Encoder:
        """An encoder in host memory that all checkpoints are written from, with the weights of now."""
        if self._encoder_on_host is None:
            with torch.random.fork_rng(devices=[]):  # its first weights, drawn and overwritten, are not training's
                self._encoder_on_host = create_encoder(encoder.settings)
        self._encoder_on_host.load_state_dict(on_host(encoder.state_dict()), assign=True)
        return self._encoder_on_host


def save_checkpoint(
    run: Path,
    encoder: Encoder,
    state: dict[str, Any],
    *,
    step: int,
    identity: str,
    num_kept: int,
    validation: float | None = None,
) -> Path:
    """Publishes encoder and state after `step` optimizer steps; the last `num_kept` checkpoints and the best stay.

    Args:
        encoder: Stored as an encoder artifact, ready to embed with.
        state: What else a resumed run needs: tensors, numbers and plain containers of them.
        identity: Fingerprint of settings and data; a resume with another one is refused.
        validation: Of these very weights, higher is better; None where they were not validated.
    """
    return _publish(
        run, encoder, on_host(state), step=step, identity=identity, num_kept=num_kept, validation=validation
    )


def load_newest_checkpoint(
    run: Path, *, identity: str, difference: Callable[[], str] = lambda: "other settings or data"
) -> Checkpoint | None:
    """The newest whole checkpoint, or None where a run begins.

    A damaged checkpoint is passed over with a warning; older ones are tried.

    Args:
        difference: What a run with another identity has, for people.

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
                f"{run} holds a run with {difference()}. Choose another run folder, or remove this one."
            )
        return Checkpoint(
            step=manifest.details["step"],
            weights=read_weights(folder / _ENCODER_FOLDER),
            state=torch.load(folder / _STATE_NAME, weights_only=True, map_location="cpu"),
        )
    return None


def best_checkpoint(run: Path) -> BestCheckpoint | None:
    """The best of those that were validated; None where none was. Unreadable ones do not count."""
    best: BestCheckpoint | None = None
    for folder in _folders(run):
        try:
            details = read_manifest(folder, kind=CHECKPOINT_KIND, newest_version=CHECKPOINT_VERSION).details
        except DamagedArtifact:
            continue  # resuming warns of it
        value = details.get("validation")
        if value is not None and (best is None or value > best.value):
            best = BestCheckpoint(details["step"], value, folder)
    return best


def on_host(state: Any) -> Any:
    """A copy of plain containers whose tensors lie in host memory, each with bytes of its own.

    Raises:
        TypeError: something in it could not be read again as plain data.
    """
    match state:
        case Tensor():
            return state.detach().to("cpu", copy=True)
        case Mapping():
            return {key: on_host(value) for key, value in state.items()}
        case list() | tuple():
            return type(state)(on_host(value) for value in state)
        case None | bool() | int() | float() | str():
            return state
    raise TypeError(f"a checkpoint holds tensors, numbers and plain containers of them, found {type(state).__name__}")


def _publish(
    run: Path,
    encoder: Encoder,
    state: dict[str, Any],
    *,
    step: int,
    identity: str,
    num_kept: int,
    validation: float | None,
) -> Path:
    folder = _folder(run, step)
    # Later checkpoints are damaged ones that were passed over: the run went on from before them.
    for later in [other for other in _folders(run) if _step_of(other) > step]:
        shutil.rmtree(later)
    with publishing(folder, replace=True) as temporary:
        (temporary / _ENCODER_FOLDER).mkdir()
        write_encoder(encoder, temporary / _ENCODER_FOLDER)
        torch.save(state, temporary / _STATE_NAME)
        details = {"step": step, "identity": identity}
        if validation is not None:
            details["validation"] = validation
        write_manifest(temporary, Manifest(CHECKPOINT_KIND, CHECKPOINT_VERSION, details=details))
    best = best_checkpoint(run)
    # Before anything is removed: what best.json names must exist.
    _write_best(run, best)
    for old in _folders(run)[:-num_kept]:
        if best is None or old != best.folder:
            shutil.rmtree(old)
    return folder


def _write_best(run: Path, best: BestCheckpoint | None) -> None:
    path = run / "checkpoints" / BEST_NAME
    if best is None:
        path.unlink(missing_ok=True)  # of a checkpoint that was damaged
        return
    tree = {"step": best.step, "value": best.value, "checkpoint": best.folder.name}
    write_text_atomically(path, json.dumps(tree) + "\n")


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def _folders(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").glob("step_*"), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
