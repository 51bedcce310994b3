"""Settings of a training run; imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_pipelines.settings import AugmentationSettings, ShardCacheSettings
from lookalike.encoder_settings import EncoderSettings, RandomWeights, Weights
from lookalike.settings import Settings
from training.backend_settings import BackendSettings, SingleBackend
from training.loss_settings import LossSettings, RecallAtKLoss
from training.optimizer_settings import OptimizerSettings
from training.validation_settings import ValidationSettings


class HardClassSettings(Settings):
    """Classes that look alike to the encoder meet in a batch, in place of any."""

    classes_per_group: Annotated[int, Field(ge=2)] = 4
    """A class and those nearest to it that are still free; divides `classes_per_batch`."""
    first_epoch: PositiveInt = 1
    """Epochs before this one, from 0, take any classes together: embeddings must mean something first."""
    epochs_between: PositiveInt = 1
    """Looks for the nearest classes anew every so many epochs; the loader's processes then begin anew, too."""
    num_near: PositiveInt = 50
    """Nearest classes that are known of each; where all of them are taken, any fill the group."""


class BatchSettings(Settings):
    """One optimizer step: classes x images, processed in chunks by two passes."""

    classes_per_batch: PositiveInt
    """Classes in the global batch, over all processes."""
    images_per_class: Annotated[int, Field(ge=2)] = 4
    """Images of each class; classes that have fewer repeat them under other augmentations."""
    chunk_size: PositiveInt | Literal["auto"] = 64
    """Images per forward pass; memory grows with it, gradients do not change. auto: the smallest fast size, measured
    when the run begins."""
    num_kept_chunks: NonNegativeInt | Literal["auto"] = 0
    """Chunks whose graph is kept from the first pass, which saves their second one and costs memory. auto: as many as
    the memory budget holds."""
    memory_budget: PositiveInt | Literal["auto"] = "auto"
    """Bytes of each process for what is `auto`; auto: most of the memory that is free when the run begins."""
    hard_classes: HardClassSettings | None = None
    """Which classes meet; null: any."""

    @property
    def num_images(self) -> int:
        return self.classes_per_batch * self.images_per_class

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> "BatchSettings":
        if self.hard_classes is not None and self.classes_per_batch % self.hard_classes.classes_per_group:
            raise ValueError(
                f"hard_classes.classes_per_group ({self.hard_classes.classes_per_group}) must divide "
                f"classes_per_batch ({self.classes_per_batch})"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_shared_out_once(self) -> "BatchSettings":
        if self.chunk_size == "auto" and self.num_kept_chunks != "auto":
            raise ValueError(
                "chunk_size auto needs num_kept_chunks auto: so many chunks of an unknown size may not fit into memory"
            )
        if self.memory_budget != "auto" and self.num_kept_chunks != "auto":
            raise ValueError("memory_budget has no effect without num_kept_chunks auto")
        return self


class ComputeSettings(Settings):
    """How the encoder is computed; the loss always is in float32."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the encoder; weights and embeddings stay in float32."""
    recomputes_activations: bool = False
    """Gradient checkpointing of the backbone: less memory, about a third more time, the same gradient."""
    compiles_backbone: bool = False
    """torch.compile of the backbone: the first steps take minutes."""


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
    num_steps: NonNegativeInt = 0
    """Optimizer steps; 0 where `num_epochs` says how long."""
    num_epochs: PositiveInt | None = None
    """Passes over all classes, in place of `num_steps`."""
    batch: BatchSettings
    """The large batch."""
    encoder: EncoderSettings
    """The network."""
    weights: Weights = RandomWeights()
    """Where the backbone starts from."""
    frozen: tuple[str, ...] = ()
    """Parameter name prefixes that stay as they are, e.g. `backbone.conv_stem`."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """Whether batch norms use stored statistics, or those of each chunk, whose average over a step is then stored."""
    loss: LossSettings = RecallAtKLoss()
    """What is minimised."""
    optimizer: OptimizerSettings
    """How."""
    compute: ComputeSettings = ComputeSettings()
    """In which arithmetic."""
    backend: BackendSettings = SingleBackend()
    """How several processes share the work of a step; results differ in their last bits."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which then becomes the encoder."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Random changes of the training pictures."""
    validation: ValidationSettings | None = None
    """Holds out training classes, and makes the checkpoint that is best on them the encoder; null trains on all."""
    tensorboard: bool = False
    """Writes the numbers of each step for TensorBoard, too, into RUN/tensorboard."""
    steps_per_checkpoint: PositiveInt = 100
    """A checkpoint every so many steps; on CPUs a killed run resumes from the last one to the same bits."""
    num_kept_checkpoints: PositiveInt = 2
    """Older checkpoints are removed, but for the best by validation."""
    writes_checkpoints_in_background: bool = False
    """Trains on while a checkpoint is written, for the price of a copy of weights and optimizer in host memory."""
    num_workers: NonNegativeInt = 2
    """Processes that decode and augment; results do not depend on it."""
    num_threads: PositiveInt | None = None
    """Threads of the arithmetic; null takes all cores. Bit-equal reruns need the same number."""
    seed: NonNegativeInt = 0
    """Of weights, batches, augmentation, mixing and mining."""

    @model_validator(mode="after")
    def _address_has_a_cache(self) -> "TrainSettings":
        if "://" in self.shards and self.shard_cache is None:
            raise ValueError(f"shards at {self.shards} are read through a local cache: set shard_cache.folder")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> "TrainSettings":
        if bool(self.num_steps) == (self.num_epochs is not None):
            raise ValueError("give num_steps or num_epochs, one of them")
        if self.num_steps and self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError(f"optimizer.warmup_steps must stay below num_steps ({self.num_steps})")
        if self.num_epochs and self.optimizer.warmup_epochs >= self.num_epochs:
            raise ValueError(f"optimizer.warmup_epochs must stay below num_epochs ({self.num_epochs})")
        return self

    @model_validator(mode="after")
    def _every_milestone_is_reached(self) -> "TrainSettings":
        """Where the length is given in what milestones are counted in; else `run_length.with_num_steps` sees to it."""
        name, length = (
            ("num_steps", self.num_steps) if self.optimizer.unit == "step" else ("num_epochs", self.num_epochs)
        )
        if length and self.optimizer.milestones and self.optimizer.milestones[-1] >= length:
            raise ValueError(
                f"optimizer.milestones: {self.optimizer.milestones[-1]} must stay below {name} ({length}), or its drop "
                "would never come; leave it out, or train longer"
            )
        return self

    @model_validator(mode="after")
    def _memory_holds_a_batch(self) -> "TrainSettings":
        size = getattr(self.loss, "memory_size", None)
        if size is not None and size < self.batch.num_images:
            raise ValueError(f"loss.memory_size ({size}) must hold a batch of {self.batch.num_images} images")
        return self

    @model_validator(mode="after")
    def _both_passes_see_the_same_network(self) -> "TrainSettings":
        if self.batch_norm == "trained":
            if self.batch.chunk_size == "auto":
                raise ValueError(
                    "batch_norm trained normalises each chunk by itself, so batch.chunk_size is part of the result: "
                    "give a number, not auto"
                )
            if self.batch.num_images % self.batch.chunk_size:
                raise ValueError(
                    f"batch_norm trained needs equal chunks, since each is normalised by itself: batch.chunk_size "
                    f"({self.batch.chunk_size}) must divide the batch ({self.batch.num_images} images)"
                )
            if self.compute.compiles_backbone:
                raise ValueError(
                    "batch_norm trained cannot be combined with compute.compiles_backbone: averaging the statistics of "
                    "chunks would break the compiled program at every norm"
                )
        return self
