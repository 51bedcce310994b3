"""Settings of the training back ends: how processes share the work on one optimizer step; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lookalike.settings import Settings


class SingleBackend(Settings):
    """The plain encoder. Several processes sum their gradients by one all-reduce after the backward pass."""

    name: Literal["single"] = "single"


class DDPBackend(Settings):
    """DistributedDataParallel: gradients are summed while the last chunk's backward pass is still running."""

    name: Literal["ddp"]
    bucket_megabytes: PositiveInt = 25
    """Gradients sent in one message."""


class FSDP2Backend(Settings):
    """fully_shard: weights, gradients and optimizer state are spread over the processes."""

    name: Literal["fsdp2"]
    smallest_unit: PositiveInt = 1_000_000
    """Parameters from which a block of the backbone is gathered by itself; smaller ones are gathered together."""


class DeepSpeedBackend(Settings):
    """DeepSpeed's ZeRO; needs the extra `deepspeed`."""

    name: Literal["deepspeed"]
    zero_stage: Literal[1, 2, 3] = 2
    """What is spread over the processes: 1 the optimizer's state, 2 gradients, too, 3 weights, too."""
    largest_whole_parameter: Annotated[int, Field(ge=0)] | None = None
    """Stage 3: parameters of up to so many elements are not spread; null takes DeepSpeed's default."""


BackendSettings = Annotated[SingleBackend | DDPBackend | FSDP2Backend | DeepSpeedBackend, Field(discriminator="name")]
