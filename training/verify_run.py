"""The check of `verify_gradients` on a run's own encoder, loss, back end and first pictures."""

import torch
from torch import Tensor

from data_pipelines.loader import training_batches
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import TrainingTransform
from lookalike.world import World
from training.distributed_loss import score_across_ranks
from training.large_batch import ScoreEmbeddings
from training.loss_registry import create_loss
from training.run_length import plan_batches, training_classes
from training.settings import TrainSettings
from training.training_state import new_encoder, optimizer_maker, require_supported_settings
from training.verify_gradients import GradientCheck, verify_gradients

# Rank 0 computes those of all ranks alone.
_MAX_PICTURES_PER_RANK = 64
_NUM_CHUNKS = 4


def verify_run(settings: TrainSettings, *, world: World) -> list[GradientCheck]:
    """Compares the gradient of a first step by all processes with that by one; collective, the same on every rank.

    The batch is cut to 64 pictures per process in whole classes, and where the settings leave chunks to the machine, to
    four chunks of which one keeps its graph. Writes nothing.

    Raises:
        SettingsError, DataError, ResourceError: as training would.
    """
    require_supported_settings(settings, world)
    settings = with_small_batch(settings, world)
    with ShardSet.open(settings.shards, cache=settings.shard_cache) as shard_set:
        classes = training_classes(settings, shard_set)
        batches = training_batches(
            shard_set,
            plan_batches(settings, shard_set, world),
            TrainingTransform(settings.augmentation, settings.encoder.input.size),
            world=world,
            seed=settings.seed,
            steps=range(1),
            num_workers=0,
        )
        [batch] = batches
    encoder = new_encoder(settings)

    def make_score(labels: Tensor, among: World) -> ScoreEmbeddings:
        torch.manual_seed(settings.seed)  # of what the loss learns: the same for both computations
        loss = create_loss(settings.loss, dim=encoder.dim, classes=classes, seed=settings.seed)

        def score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
            moved = loss.to(embeddings.device, embeddings.dtype)
            scored = score_across_ranks(embeddings, labels, moved, step=0, world=among)
            return scored.loss, scored.gradient

        return score

    chunk_size, num_kept_chunks = settings.batch.chunk_size, settings.batch.num_kept_chunks
    assert chunk_size != "auto"  # with_small_batch resolved both
    assert num_kept_chunks != "auto"
    return verify_gradients(
        encoder,
        batch.pixels,
        batch.labels,
        make_score,
        optimizer_maker(settings, None),
        backend=settings.backend,
        chunk_size=chunk_size,
        num_kept_chunks=num_kept_chunks,
        world=world,
    )


def with_small_batch(settings: TrainSettings, world: World) -> TrainSettings:
    """The same settings with a batch that one process can compute alone, in chunks that divide a process's part."""
    batch = settings.batch
    most = min(batch.classes_per_batch, world.size * _MAX_PICTURES_PER_RANK // batch.images_per_class)
    divisible = [count for count in range(1, most + 1) if count * batch.images_per_class % world.size == 0]
    num_classes = divisible[-1] if divisible else batch.classes_per_batch
    num_pictures = num_classes * batch.images_per_class // world.size
    wanted = max(1, num_pictures // _NUM_CHUNKS) if batch.chunk_size == "auto" else batch.chunk_size
    small = {
        "classes_per_batch": num_classes,
        "chunk_size": max(size for size in range(1, num_pictures + 1) if num_pictures % size == 0 and size <= wanted),
        "num_kept_chunks": 1 if batch.num_kept_chunks == "auto" else batch.num_kept_chunks,
        "memory_budget": "auto",
    }
    return settings.model_copy(update={"batch": batch.model_copy(update=small)})
