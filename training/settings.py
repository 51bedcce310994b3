"""Settings of a training run; imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.settings import AugmentationSettings, ShardCacheSettings
from lookalike.encoder_settings import EncoderSettings, RandomWeights, Weights
from lookalike.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class RecallAtKLoss(Settings):
    """RS@k, the recall@k surrogate, with similarity mixup (SiMix)."""

    name: Literal["recall_at_k"] = "recall_at_k"
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """The k of recall@k; the loss is their mean."""
    rank_temperature: PositiveFloat = 0.01
    """Width of the sigmoid that counts better-ranked images, in cosine similarity."""
    k_temperature: PositiveFloat = 1.0
    """Width of the sigmoid that compares a rank with k, in ranks."""
    definition: Literal["paper", "released"] = "paper"
    """The paper's formula, or that of its released code, which ranks the query itself, too."""
    mixes_similarities: bool = False
    """SiMix: adds the virtual mixtures of each class's pairs as queries, positives and negatives."""


class BatchSettings(Settings):
    """One optimizer step: classes x images, processed in chunks by two passes."""

    classes_per_batch: PositiveInt
    """Classes in the global batch, over all processes."""
    images_per_class: Annotated[int, Field(ge=2)] = 4
    """Images of each class; classes that have fewer repeat them under other augmentations."""
    chunk_size: PositiveInt = 64
    """Images per forward pass; memory grows with it, gradients do not change."""
    num_kept_chunks: NonNegativeInt = 0
    """Chunks whose graph is kept from the first pass, which saves their second one and costs memory."""

    @property
    def num_images(self) -> int:
        return self.classes_per_batch * self.images_per_class


class OptimizerSettings(Settings):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat
    """Highest learning rate of the backbone."""
    projection_lr_multiplier: PositiveFloat = 1.0
    """Times the learning rate for projection and pooling, which start untrained."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled; never applied to norms, biases and the pooling's power."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up; cosine ends at 0."""
    max_gradient_norm: PositiveFloat | None = None
    """Clips the gradient's 2-norm over all parameters."""


class TrainSettings(Settings):
    """A training run."""

    shards: str
    """Shard set to train on: a folder, or an address that fsspec knows, such as s3://bucket/shards."""
    shard_cache: ShardCacheSettings | None = None
    """Where shards of an address are kept on this machine; required for one."""
    run: Path
    """Run folder: checkpoints, events, and at the end the encoder."""
    split: str | None = "train"
    """Split of the shard set; null takes all pictures."""
    num_steps: PositiveInt
    """Optimizer steps."""
    batch: BatchSettings
    """The large batch."""
    encoder: EncoderSettings
    """The network."""
    weights: Weights = RandomWeights()
    """Where the backbone starts from."""
    frozen: tuple[str, ...] = ()
    """Parameter name prefixes that stay as they are, e.g. `backbone.conv_stem`."""
    loss: RecallAtKLoss = RecallAtKLoss()
    """What is minimised."""
    optimizer: OptimizerSettings
    """How."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which then becomes the encoder."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Random changes of the training pictures."""
    steps_per_checkpoint: PositiveInt = 100
    """A checkpoint every so many steps; on CPUs a killed run resumes from the last one to the same bits."""
    num_kept_checkpoints: PositiveInt = 2
    """Older checkpoints are removed."""
    num_workers: NonNegativeInt = 2
    """Processes that decode and augment; results do not depend on it."""
    num_threads: PositiveInt | None = None
    """Threads of the arithmetic; null takes all cores. Bit-equal reruns need the same number."""
    seed: NonNegativeInt = 0
    """Of weights, batches, augmentation and mixing."""

    @model_validator(mode="after")
    def _address_has_a_cache(self) -> "TrainSettings":
        if "://" in self.shards and self.shard_cache is None:
            raise ValueError(f"shards at {self.shards} are read through a local cache: set shard_cache.folder")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainSettings":
        if self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError(f"optimizer.warmup_steps must stay below num_steps ({self.num_steps})")
        return self
