"""DeepSpeed's ZeRO around the two passes; the one file that imports deepspeed.

What DeepSpeed 0.19.8 does, mostly silently, and what is done about it here:

* Several backward passes before one step give wrong gradients in stages 1 and 2: all of them run inside
  `coalesce_grad_reduction`, which also leaves one reduction per step.
* Gradients are averaged over ranks: what is fed back is multiplied by their number.
* An autocast around the engine is turned off inside it: it is turned on again within.
* Parameters without dimensions (the pooling's power) are not supported: they become vectors of one, and numbers again
  in what is exported.
* An operator that only inference needs is compiled when processes join, for minutes, and a process killed meanwhile
  leaves a lock on which later ones wait forever: it is switched off. So are DeepSpeed's own optimizers, which compile,
  too, by bringing one of torch's.
"""

import logging
import os
import warnings
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lookalike.collectives import gather_on_first
from lookalike.encoder import Encoder
from lookalike.errors import ResourceError, SettingsError
from lookalike.world import World
from training.backend_settings import DeepSpeedBackend
from training.backends.protocol import MakeOptimizer, require_equal_passes, require_only_encoder

# Where the torch optimizer's state lies in what a ZeRO optimizer saves, by stage.
_OPTIMIZER_KEYS = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}


class DeepSpeed:
    """Weights stay in float32 in all stages; autocast decides the arithmetic, as everywhere else."""

    def __init__(
        self,
        settings: DeepSpeedBackend,
        encoder: Encoder,
        make_optimizer: MakeOptimizer,
        *,
        max_gradient_norm: float | None,
        world: World,
    ) -> None:
        self._library = load_deepspeed()
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists on torchrun's variable
        # ZeRO cuts flat copies of the weights.
        encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._numbers = _make_vectors_of_numbers(encoder)
        self._encoder = encoder
        self._stage = settings.zero_stage
        self.spreads_weights = settings.spreads_weights
        self._world = world
        optimizer = make_optimizer(encoder)
        require_only_encoder(encoder, optimizer, name="deepspeed")
        self._engine, self.optimizer, _, _ = self._library.initialize(
            model=_UnderAutocast(encoder),
            optimizer=optimizer,
            config=_configuration(settings, max_gradient_norm),
            dist_init_required=False,
        )
        self.network: nn.Module = _Engine(self._engine, encoder)
        self._backward_passes = ExitStack()
        self._is_reducing = False

    def begin_step(self, *, num_chunks: int, num_kept_chunks: int) -> None:
        require_equal_passes(self._encoder, num_chunks, num_kept_chunks, self._world)
        self._engine.zero_grad()

    def backward_chunk(
        self, embeddings: Float[Tensor, "chunk dim"], gradient: Float[Tensor, "chunk dim"], is_last: bool
    ) -> None:
        if not self._is_reducing:
            self._backward_passes.enter_context(self._engine.coalesce_grad_reduction())
            self._is_reducing = True
        embeddings.backward(gradient * self._world.size)
        if is_last:
            self._backward_passes.close()
            self._is_reducing = False

    def step(self) -> Float[Tensor, ""]:
        self._engine.step()  # clips; skips the step where the norm is not finite
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32).detach().cpu()

    def full_gradients(self) -> dict[str, Tensor]:
        return {
            name: self._in_shape(name, self._library.utils.safe_get_full_grad(parameter)).cpu()
            for name, parameter in self._encoder.named_parameters()
            if parameter.requires_grad
        }

    def full_weights(self) -> dict[str, Tensor]:
        weights = {}
        parameters = dict(self._encoder.named_parameters())
        for name, value in self._encoder.state_dict(keep_vars=True).items():
            # One parameter after the other: no more than one is whole on a device at a time.
            with self._library.zero.GatheredParameters([value], enabled=self._stage == 3 and name in parameters):
                if self._world.is_first:
                    weights[name] = self._in_shape(name, value).detach().cpu().clone()
        return weights

    def optimizer_state(self) -> dict[str, Any]:
        own = self.optimizer.state_dict()[_OPTIMIZER_KEYS[self._stage]]
        ranks = gather_on_first(_on_cpu(own), self._world)
        return {"zero_stage": self._stage, "ranks": ranks} if self._world.is_first else {}

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, Any] | None) -> None:
        if optimizer_state is not None:
            self._require_same_spread(optimizer_state)
        parameters = dict(self._encoder.named_parameters())
        for name, value in self._encoder.state_dict(keep_vars=True).items():
            with (
                torch.no_grad(),
                self._library.zero.GatheredParameters(
                    [value], modifier_rank=0, enabled=self._stage == 3 and name in parameters
                ),
            ):
                value.copy_(weights[name].view_as(value))
        self.optimizer.refresh_fp32_params()
        if optimizer_state is not None:
            # All but the torch optimizer's part is as this engine has it.
            state = self.optimizer.state_dict()
            state[_OPTIMIZER_KEYS[self._stage]] = optimizer_state["ranks"][self._world.rank]
            self.optimizer.load_state_dict([state] * self._world.size, load_from_fp32_weights=True)

    def _in_shape(self, name: str, value: Tensor) -> Tensor:
        return value.reshape(()) if name in self._numbers else value

    def _require_same_spread(self, state: dict[str, Any]) -> None:
        found = state.get("zero_stage"), len(state.get("ranks", ()))
        if found != (self._stage, self._world.size):
            described = "another back end" if found[0] is None else f"ZeRO {found[0]} over {found[1]} processes"
            raise SettingsError(
                f"the optimizer's state is that of {described}; this is ZeRO {self._stage} over {self._world.size} "
                "processes, and DeepSpeed cannot spread it anew. Go on as before, or start a new run from the "
                "checkpoint's encoder; back ends single, ddp and fsdp2 go on with any number of processes."
            )


class _UnderAutocast(nn.Module):
    """Runs the encoder under the autocast that its caller saw outside the engine."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, pixels: UInt8[Tensor, "chunk 3 height width"], autocast: torch.dtype | None
    ) -> Float[Tensor, "chunk dim"]:
        with torch.autocast(pixels.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            embeddings: Tensor = self.encoder(pixels)
        return embeddings


class _Engine(nn.Module):
    """Looks like the encoder, and calls the engine."""

    def __init__(self, engine: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._call = engine.__call__

    def forward(self, pixels: UInt8[Tensor, "chunk 3 height width"]) -> Float[Tensor, "chunk dim"]:
        device = pixels.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            embeddings: Tensor = self._call(pixels, autocast)
        return embeddings


def load_deepspeed() -> ModuleType:
    """Imports DeepSpeed and keeps it from compiling anything.

    Raises:
        ResourceError: it is not installed, or too old.
    """
    try:
        # Without type hints, and not everywhere installed.
        import deepspeed  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ResourceError(
            f"backend deepspeed: {error}. Install lookalike with the extra [deepspeed], beside the torch you have."
        ) from error
    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise ResourceError(
            f"backend deepspeed needs DeepSpeed 0.19.8 or newer, found {deepspeed.__version__}: older ones reduce "
            "gradients once per chunk."
        )
    # Private, for want of a public switch; see the head of this file.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch 2.13 calls old, once or more per step.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    library: ModuleType = deepspeed
    return library


def _make_vectors_of_numbers(encoder: nn.Module) -> frozenset[str]:
    """Gives parameters without dimensions one; returns their names."""
    names = frozenset(name for name, parameter in encoder.named_parameters() if parameter.ndim == 0)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        number = encoder.get_parameter(name)
        vector = nn.Parameter(number.detach().reshape(1), requires_grad=number.requires_grad)
        setattr(encoder.get_submodule(owner), attribute, vector)
    return names


def _configuration(settings: DeepSpeedBackend, max_gradient_norm: float | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.largest_whole_parameter is not None:
        zero["stage3_param_persistence_threshold"] = settings.largest_whole_parameter
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and used in DeepSpeed's logs only
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def _on_cpu(tree: Any) -> Any:
    """A copy whose tensors lie on the CPU and own their memory."""
    match tree:
        case Tensor():
            return tree.detach().cpu().clone()
        case dict():
            return {key: _on_cpu(value) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(_on_cpu(value) for value in tree)
        case _:
            return tree
