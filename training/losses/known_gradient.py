"""A loss whose gradient is worked out together with it: its place in autograd's graph."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from training.losses.smooth_ranks import RankLoss


def with_known_gradient(
    compute: Callable[[Tensor, bool], RankLoss], embeddings: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """The loss that `compute(embeddings, with_gradient)` gives, to call `backward()` on, once.

    The gradient is kept until the backward pass, which only scales it; a gradient of the gradient is refused. Without
    a graph to build (`torch.no_grad`, embeddings that need no gradient) only the loss is worked out.
    """
    with_gradient = torch.is_grad_enabled() and embeddings.requires_grad
    result = compute(embeddings.detach(), with_gradient)
    return _KnownGradient.apply(embeddings, result.loss, result.gradient) if with_gradient else result.loss


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Float[Tensor, "batch dim"],
        loss: Float[Tensor, ""],
        gradient: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(gradient)
        ctx.dtype = embeddings.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, loss_gradient: Float[Tensor, ""]) -> tuple[Float[Tensor, "batch dim"], None, None]:
        # Autograd builds a graph of a backward pass only to differentiate it again; this one would pass for a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("a rank loss has no second derivative: leave out create_graph=True")
        (gradient,) = ctx.saved_tensors
        # Scaled before it is narrowed: a loss scale exists to keep small gradients representable in half precision.
        return (gradient * loss_gradient).to(ctx.dtype), None, None
