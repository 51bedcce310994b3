"""fully_shard: weights, gradients and optimizer state spread over the processes, gathered block by block."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from lookalike.collectives import sum_over_ranks
from lookalike.encoder import Encoder
from lookalike.world import World
from training.backend_settings import FSDP2Backend
from training.backends.protocol import MakeOptimizer, require_equal_passes, require_only_encoder
from training.backends.single import require_whole_state, trained_parameters


class FSDP2:
    """Weights are gathered for each pass and dropped after it; gradients are reduced with the last chunk.

    Until then each process holds the whole gradient of what it has seen. The optimizer's state is stored whole: it
    fits any number of processes, and the back ends that spread nothing.
    """

    spreads_weights = True

    def __init__(
        self,
        settings: FSDP2Backend,
        encoder: Encoder,
        make_optimizer: MakeOptimizer,
        *,
        max_gradient_norm: float | None,
        world: World,
    ) -> None:
        # fully_shard takes contiguous parameters only; convolutions convert them in passing.
        encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # Nor does it take numbers such as the pooling's power: every process keeps those, and we sum their gradients.
        self._numbers = [parameter for parameter in encoder.parameters() if parameter.ndim == 0]
        for unit in _units(encoder.backbone, settings.smallest_unit):
            fully_shard(unit, ignored_params=set(self._numbers))
        fully_shard(encoder, ignored_params=set(self._numbers))
        self._sharded = cast(FSDPModule, encoder)
        self.network: nn.Module = encoder
        self.optimizer = make_optimizer(encoder)
        require_only_encoder(encoder, self.optimizer, name="fsdp2")
        for group in self.optimizer.param_groups:
            if len({isinstance(parameter, DTensor) for parameter in group["params"]}) == 2:
                group["foreach"] = False  # torch cannot step both kinds in one call
        self._max_gradient_norm = max_gradient_norm
        self._world = world

    def begin_step(self, *, num_chunks: int, num_kept_chunks: int) -> None:
        require_equal_passes(self.network, num_chunks, num_kept_chunks, self._world)
        self.optimizer.zero_grad(set_to_none=True)

    def backward_chunk(
        self, embeddings: Float[Tensor, "chunk dim"], gradient: Float[Tensor, "chunk dim"], is_last: bool
    ) -> None:
        self._sharded.set_requires_gradient_sync(is_last)
        self._sharded.set_is_last_backward(is_last)
        # fully_shard averages over ranks; the parts of the loss are shares of the global mean and must be summed.
        embeddings.backward(gradient * self._world.size)
        if is_last:
            gradients = [number.grad for number in self._numbers if number.grad is not None]
            sum_over_ranks(gradients, self._world)
            for gradient in gradients:
                gradient.div_(self._world.size)

    def step(self) -> Float[Tensor, ""]:
        gradients = [p.grad for p in trained_parameters(self.optimizer) if p.grad is not None]
        spread = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        norm = torch.stack([_whole(get_total_norm(kind)) for kind in (spread, whole) if kind]).norm()
        if not torch.isfinite(norm):
            return norm
        if self._max_gradient_norm is not None:
            # torch's own clipping takes either kind, not both.
            factor = min(1.0, self._max_gradient_norm / (norm.item() + 1e-6))
            for gradient in gradients:
                gradient.mul_(factor)
        self.optimizer.step()
        return norm

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: _whole(p.grad).cpu() for name, p in self.network.named_parameters() if p.grad is not None}

    def full_weights(self) -> dict[str, Tensor]:
        return self._on_first(self.network.state_dict())

    def optimizer_state(self) -> dict[str, Any]:
        tree = self.optimizer.state_dict()
        state = {index: self._on_first(values) for index, values in tree["state"].items()}
        return {"state": state, "param_groups": tree["param_groups"]} if self._world.is_first else {}

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, Any] | None) -> None:
        own = self.network.state_dict()
        self.network.load_state_dict({name: _spread_as(own[name], value) for name, value in weights.items()})
        if optimizer_state is None:
            return
        require_whole_state(optimizer_state, name="fsdp2")
        parameters = trained_parameters(self.optimizer)
        state = {
            index: {
                key: _spread_as(parameters[index], value) if _is_per_element(value, parameters[index]) else value
                for key, value in values.items()
            }
            for index, values in optimizer_state["state"].items()
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": optimizer_state["param_groups"]})

    def _on_first(self, values: dict[str, Any]) -> dict[str, Any]:
        """Gathers one tensor after the other: no more than one is whole on a device at a time."""
        gathered = {}
        for name, value in values.items():
            whole = _whole(value) if isinstance(value, Tensor) else value
            if self._world.is_first:
                gathered[name] = whole.detach().cpu().clone() if isinstance(whole, Tensor) else whole
        return gathered


def _units(module: nn.Module, smallest: int) -> Iterator[nn.Module]:
    """Blocks that hold at least `smallest` parameters, found inside lists and sequences of blocks."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _units(child, smallest)
        elif sum(parameter.numel() for parameter in child.parameters()) >= smallest:
            yield child


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_per_element(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and parameter.ndim > 0


def _spread_as(example: Tensor, value: Tensor) -> Tensor:
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
