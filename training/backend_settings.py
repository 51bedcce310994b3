"""Settings of the training back ends: how processes share the work on one optimizer step; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lookalike.settings import Settings


class _Backend(Settings):
    @property
    def spreads_weights(self) -> bool:
        """Whether no process holds all weights."""
        return False


class SingleBackend(_Backend):
    """The plain encoder. Several processes sum their gradients by one all-reduce after the backward pass."""

    name: Literal["single"] = "single"


class DDPBackend(_Backend):
    """DistributedDataParallel: gradients are summed while the last chunk's backward pass is still running."""

    name: Literal["ddp"]
    bucket_megabytes: PositiveInt = 25
    """Gradients sent in one message."""


class FSDP2Backend(_Backend):
    """fully_shard: weights, gradients and optimizer state are spread over the processes."""

    name: Literal["fsdp2"]
    smallest_unit: PositiveInt = 1_000_000
    """Parameters from which a block of the backbone is gathered by itself; smaller ones are gathered together."""

    @property
    def spreads_weights(self) -> bool:
        return True


class DeepSpeedBackend(_Backend):
    """DeepSpeed's ZeRO; needs the extra `deepspeed`."""

    name: Literal["deepspeed"]
    zero_stage: Literal[1, 2, 3] = 2
    """What is spread over the processes: 1 the optimizer's state, 2 gradients, too, 3 weights, too."""
    largest_whole_parameter: Annotated[int, Field(ge=0)] | None = None
    """Stage 3: parameters of up to so many elements are not spread; null takes DeepSpeed's default."""

    @property
    def spreads_weights(self) -> bool:
        return self.zero_stage == 3


BackendSettings = Annotated[SingleBackend | DDPBackend | FSDP2Backend | DeepSpeedBackend, Field(discriminator="name")]
