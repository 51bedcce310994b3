"""The plain encoder; gradients of several processes are summed by one all-reduce after the last chunk.

See docs/decisions/0004-gradients-are-summed-by-us.md.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lookalike.collectives import sum_over_ranks
from lookalike.encoder import Encoder
from lookalike.errors import SettingsError
from lookalike.world import World
from training.backends.protocol import MakeOptimizer


class Single:
    """Every process holds everything. Its files of weights and optimizer state fit any number of processes."""

    spreads_weights = False

    def __init__(
        self, encoder: Encoder, make_optimizer: MakeOptimizer, *, max_gradient_norm: float | None, world: World
    ) -> None:
        self.network: nn.Module = encoder
        self.optimizer = make_optimizer(encoder)
        self._encoder = encoder
        self._max_gradient_norm = max_gradient_norm
        self._world = world

    def begin_step(self, *, num_chunks: int, num_kept_chunks: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward_chunk(
        self, embeddings: Float[Tensor, "chunk dim"], gradient: Float[Tensor, "chunk dim"], is_last: bool
    ) -> None:
        embeddings.backward(gradient)
        if is_last:
            sum_over_ranks([p.grad for p in trained_parameters(self.optimizer) if p.grad is not None], self._world)

    def step(self) -> Float[Tensor, ""]:
        norm = torch.nn.utils.clip_grad_norm_(
            trained_parameters(self.optimizer), self._max_gradient_norm or float("inf"), error_if_nonfinite=False
        )
        if torch.isfinite(norm):
            self.optimizer.step()
        return norm

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.cpu() for name, p in self._encoder.named_parameters() if p.grad is not None}

    def full_weights(self) -> dict[str, Tensor]:
        if not self._world.is_first:
            return {}
        return {name: value.detach().cpu().clone() for name, value in self._encoder.state_dict().items()}

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict() if self._world.is_first else {}

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, Any] | None) -> None:
        self._encoder.load_state_dict(weights)
        if optimizer_state is not None:
            require_whole_state(optimizer_state, name="single or ddp")
            self.optimizer.load_state_dict(optimizer_state)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def require_whole_state(state: dict[str, Any], *, name: str) -> None:
    """Raises SettingsError for the state of an optimizer that DeepSpeed spread over processes."""
    if "zero_stage" in state:
        raise SettingsError(
            f"the optimizer's state was spread by deepspeed (ZeRO {state['zero_stage']}), backend {name} cannot take "
            "it over. Go on with backend deepspeed, or start a new run from the checkpoint's encoder."
        )
