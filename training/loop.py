"""The training loop: it reads like the paper's algorithm, and each line of it is a call one can open."""

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float, Int64
from torch import Tensor

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.loader import training_batches
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import TrainingTransform
from lookalike.artifacts import fingerprint, read_manifest, write_text_atomically
from lookalike.collectives import all_gather_rows, any_rank, barrier, sum_over_ranks
from lookalike.encoder import ENCODER_KIND, ENCODER_VERSION, Encoder, available_device, create_encoder, save_encoder
from lookalike.errors import ArtifactError, NonFiniteLoss, SettingsError
from lookalike.events import EventLog
from lookalike.progress import Progress
from lookalike.settings import dump_settings
from lookalike.world import World
from training.batch_metrics import hit_rate_of_batch
from training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from training.distributed_loss import score_across_ranks
from training.large_batch import backward_large_batch, chunk_device, freeze_batch_norm
from training.losses import mixing_coefficients, recall_at_k_surrogate, surrogate_floor
from training.optimizer import create_optimizer, freeze_parameters, schedule_factor, set_learning_rate
from training.settings import TrainSettings

# Settings that say where things lie and how fast they are read.
_NAMES_WITHOUT_EFFECT = (
    "run",
    "shards",
    "shard_cache",
    "num_workers",
    "steps_per_checkpoint",
    "num_kept_checkpoints",
    "num_threads",
)

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """All that changes from step to step."""

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    average: Encoder | None  # exponential moving average of the weights
    step: int = 0

    @property
    def result(self) -> Encoder:
        """The encoder to embed with."""
        return self.average or self.encoder

    def state_dict(self) -> dict[str, Any]:
        """All but the step and the weights of `result`, which a checkpoint stores as an encoder."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "averaged_encoder": self.encoder.state_dict() if self.average else None,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        self.result.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        if self.average is not None:
            self.encoder.load_state_dict(checkpoint.state["averaged_encoder"])


def train(settings: TrainSettings, *, world: World = World()) -> Path:
    """Trains until `num_steps`, resuming what the run folder holds, and returns the folder of the finished encoder.

    Raises:
        NonFiniteLoss: on every rank, before weights move.
        ArtifactError: the run folder belongs to another run.
        DataError, SettingsError: the shards do not allow the batches asked for.
    """
    with ShardSet.open(settings.shards, cache=settings.shard_cache) as shard_set:
        identity = run_identity(settings, shard_set)
        encoder_folder = settings.run / "encoder"
        is_finished = encoder_folder.exists()
        state = None if is_finished else begin_or_resume(settings, identity)
        _require_same_start(settings.run, None if state is None else state.step, world)
        if state is None:
            _require_same_run(settings.run, identity)
            logger.info("%s is trained already", encoder_folder)
            return encoder_folder
        if world.is_first:
            _describe_run(settings, identity)
        run_steps(state, settings, shard_set, identity=identity, world=world)
    if world.is_first:
        save_encoder(state.result, encoder_folder)
    barrier(world)
    return encoder_folder


def run_steps(
    state: TrainingState, settings: TrainSettings, shard_set: ShardSet, *, identity: str, world: World
) -> None:
    """Runs the steps from `state.step` to `num_steps`, with events and checkpoints."""
    plan = plan_batches(settings, shard_set, world)
    batches = training_batches(
        shard_set,
        plan,
        TrainingTransform(settings.augmentation, settings.encoder.input.size),
        world=world,
        seed=settings.seed,
        steps=range(state.step, settings.num_steps),
        num_workers=settings.num_workers,
    )
    with (
        EventLog(settings.run / f"events-rank{world.rank}.jsonl") as events,
        Progress(
            settings.num_steps, description="training", unit="steps", done=state.step, is_shown=world.is_first
        ) as progress,
    ):
        started = time.perf_counter()
        for batch in batches:
            set_learning_rate(
                state.optimizer, schedule_factor(batch.step, settings.optimizer, num_steps=settings.num_steps)
            )
            measured = take_step(state, batch.pixels, batch.labels, settings, step=batch.step, world=world)
            # From the end of the step before: waiting for pictures counts.
            finished = time.perf_counter()
            measured["images_per_second"] = round(settings.batch.num_images / (finished - started), 2)
            started = finished
            events.write("step", step=batch.step, **measured)
            progress.advance(note=f"loss {measured['loss']:.4f}, hit rate@1 {measured['hit_rate_at_1']:.3f}")
            is_last = state.step == settings.num_steps
            if world.is_first and (state.step % settings.steps_per_checkpoint == 0 or is_last):
                save_checkpoint(
                    settings.run,
                    state.result,
                    state.state_dict(),
                    step=state.step,
                    identity=identity,
                    num_kept=settings.num_kept_checkpoints,
                )


def take_step(
    state: TrainingState,
    pixels: Tensor,
    labels: Int64[Tensor, "batch"],
    settings: TrainSettings,
    *,
    step: int,
    world: World,
) -> dict[str, float]:
    """One optimizer step on the global batch; returns what was measured."""
    encoder = state.encoder.train()
    freeze_batch_norm(encoder)
    state.optimizer.zero_grad(set_to_none=True)
    labels = labels.to(chunk_device(encoder))

    loss, embeddings = backward_large_batch(
        encoder,
        pixels,
        lambda own: score_across_ranks(own, labels, _loss_of_share(settings, step), world=world),
        chunk_size=settings.batch.chunk_size,
        num_kept_chunks=settings.batch.num_kept_chunks,
        seed=(settings.seed * settings.num_steps + step) * world.size + world.rank,
    )

    parameters = [parameter for parameter in encoder.parameters() if parameter.grad is not None]
    sum_over_ranks([parameter.grad for parameter in parameters if parameter.grad is not None], world)
    gradient_norm = torch.nn.utils.clip_grad_norm_(
        parameters, settings.optimizer.max_gradient_norm or float("inf"), error_if_nonfinite=False
    )
    if any_rank(not bool(torch.isfinite(loss) & torch.isfinite(gradient_norm)), world, device=loss.device):
        raise NonFiniteLoss(
            f"step {step}: loss {loss.item()}, gradient norm {gradient_norm.item()}; the weights are those of the step "
            "before. Lower optimizer.lr, set optimizer.max_gradient_norm, or look for broken pictures."
        )
    state.optimizer.step()
    if state.average is not None and settings.average_decay is not None:
        _update_average(state.average, encoder, decay=settings.average_decay, step=step)
    state.step = step + 1
    return {
        "loss": loss.item(),
        "loss_above_floor": loss.item() - _floor(settings),
        "hit_rate_at_1": hit_rate_of_batch(embeddings, labels),
        "gradient_norm": gradient_norm.item(),
        "lr": state.optimizer.param_groups[0]["lr"],
    }


def _loss_of_share(settings: TrainSettings, step: int) -> Any:
    options = settings.loss

    def share_of_loss(
        embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, "batch"], share: tuple[int, int]
    ) -> Float[Tensor, ""]:
        mixing = mixing_coefficients(labels, seed=settings.seed, step=step) if options.mixes_similarities else None
        return recall_at_k_surrogate(
            embeddings,
            labels,
            ks=options.ks,
            rank_temperature=options.rank_temperature,
            k_temperature=options.k_temperature,
            definition=options.definition,
            mixing=mixing,
            query_share=share,
        )

    return share_of_loss


def _floor(settings: TrainSettings) -> float:
    """The loss of a global batch whose every ranking is perfect."""
    batch, options = settings.batch, settings.loss
    labels = torch.arange(batch.classes_per_batch).repeat_interleave(batch.images_per_class)
    return surrogate_floor(
        labels,
        ks=options.ks,
        k_temperature=options.k_temperature,
        definition=options.definition,
        is_mixed=options.mixes_similarities,
    )


def plan_batches(settings: TrainSettings, shard_set: ShardSet, world: World) -> ClassBalancedBatches:
    if settings.batch.num_images % world.size:
        raise SettingsError(
            f"batch: {settings.batch.num_images} images do not divide over {world.size} processes. "
            "Choose classes_per_batch as a multiple of the number of processes."
        )
    return ClassBalancedBatches(
        shard_set.labels,
        shard_set.rows(settings.split),
        classes_per_batch=settings.batch.classes_per_batch,
        images_per_class=settings.batch.images_per_class,
        seed=settings.seed,
    )


def begin_or_resume(settings: TrainSettings, identity: str) -> TrainingState:
    """The state of step 0, or that of the newest checkpoint in the run folder."""
    torch.manual_seed(settings.seed)  # the projection's first weights
    encoder = create_encoder(settings.encoder, settings.weights).to(available_device())
    try:
        freeze_parameters(encoder, settings.frozen)
        optimizer = create_optimizer(encoder, settings.optimizer)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    average = copy.deepcopy(encoder).requires_grad_(False) if settings.average_decay is not None else None
    state = TrainingState(encoder, optimizer, average)
    checkpoint = load_newest_checkpoint(settings.run, identity=identity)
    if checkpoint is not None:
        state.load(checkpoint)
        logger.info("resuming %s after step %d", settings.run, state.step)
    return state


def run_identity(settings: TrainSettings, shard_set: ShardSet) -> str:
    """Fingerprint of the settings and data that decide what is trained.

    Where files lie and how fast they are read is left out, and so are the number of threads and processes: a run may
    go on with others, but the last bits of its weights then differ.
    """
    tree = dump_settings(settings)
    for name in _NAMES_WITHOUT_EFFECT:
        del tree[name]
    return fingerprint({"settings": tree, "shards": shard_set.fingerprint})


def _describe_run(settings: TrainSettings, identity: str) -> None:
    settings.run.mkdir(parents=True, exist_ok=True)
    text = f"# Resolved settings of this run, identity {identity}\n{yaml.safe_dump(dump_settings(settings))}"
    write_text_atomically(settings.run / "settings.yaml", text)


def _require_same_start(run: Path, step: int | None, world: World) -> None:
    """Raises ArtifactError on every rank unless all stand at the same step, or all see a finished run (None)."""
    own = torch.tensor([-1 if step is None else step], device=available_device())
    steps = all_gather_rows(own, world).tolist()
    if len(set(steps)) > 1:
        raise ArtifactError(
            f"the processes see different states of {run} (steps {sorted(set(steps))}, -1 for finished). "
            "The run folder must lie on storage that all of them share."
        )


def _require_same_run(run: Path, identity: str) -> None:
    read_manifest(run / "encoder", kind=ENCODER_KIND, newest_version=ENCODER_VERSION)
    description = run / "settings.yaml"
    if not description.exists():
        raise ArtifactError(f"{run} holds an encoder but no training run. Choose another run folder.")
    first_line = description.read_text(encoding="utf-8").partition("\n")[0]
    if not first_line.endswith(identity):
        raise ArtifactError(f"{run} holds a finished run with other settings or data. Choose another run folder.")


@torch.no_grad()
def _update_average(average: Encoder, encoder: Encoder, *, decay: float, step: int) -> None:
    # Early on the average would mostly be the untrained start: a young average forgets faster.
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), encoder.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
