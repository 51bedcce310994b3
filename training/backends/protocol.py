"""What a back end is to the training loop, and the one place that builds it.

    backend.begin_step(num_chunks=..., num_kept_chunks=...)
    backward_large_batch(backend.network, ..., backward_chunk=backend.backward_chunk)
    gradient_norm = backend.step()

After the last chunk the gradient of each parameter is the *sum* over ranks of what `backward_chunk` was given: each
rank holds its part of the global mean loss (see `training/distributed_loss.py`). Where a library averages instead, its
own file takes the factor out again. Parameters are synchronised once per step, however many chunks there are.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lookalike.collectives import all_gather_rows, broadcast_from_first
from lookalike.encoder import Encoder, create_encoder
from lookalike.errors import SettingsError
from lookalike.world import World
from training.backend_settings import (
    BackendSettings,
    DDPBackend,
    DeepSpeedBackend,
    FSDP2Backend,
    SingleBackend,
)
from training.large_batch import chunk_device

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@runtime_checkable
class Backend(Protocol):
    """An encoder and its optimizer, trained by all processes of a world together.

    All methods are collective: every rank calls them, in the same order.
    """

    network: nn.Module
    """To be called in place of the encoder, with and without a graph."""
    optimizer: torch.optim.Optimizer
    """Holds the parameter groups, whose learning rates may be set between steps."""
    spreads_weights: bool
    """Whether no process holds all weights: only `network` can then be called."""

    def begin_step(self, *, num_chunks: int, num_kept_chunks: int) -> None:
        """Forgets the gradients of the step before.

        Raises:
            SettingsError: on every rank; the ranks would run different passes and wait for each other forever.
        """

    def backward_chunk(
        self, embeddings: Float[Tensor, "chunk dim"], gradient: Float[Tensor, "chunk dim"], is_last: bool
    ) -> None:
        """Feeds a chunk's gradient back; with the last chunk gradients are summed over ranks."""

    def step(self) -> Float[Tensor, ""]:
        """Clips and moves the weights; returns the gradient's 2-norm before clipping, the same on all ranks.

        Where the norm is not finite nothing moves.
        """

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients by the encoder's parameter names, on the CPU; between the last chunk and `step`."""

    def full_weights(self) -> dict[str, Tensor]:
        """The encoder's whole state in its own names, on the CPU of the first rank; empty elsewhere."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state of all ranks, on the CPU of the first rank; empty elsewhere.

        Plain containers of tensors and numbers, as a checkpoint may hold.
        """

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, Any] | None) -> None:
        """Goes on from what `full_weights` and `optimizer_state` gave; None starts the optimizer afresh.

        Raises:
            SettingsError: the state was spread over another number of processes, or by another back end.
        """


def create_backend(
    settings: BackendSettings,
    encoder: Encoder,
    make_optimizer: MakeOptimizer,
    *,
    max_gradient_norm: float | None = None,
    world: World,
) -> Backend:
    """Wraps an encoder that is on its device, with frozen parameters marked; from here on use it through the back end.

    Args:
        make_optimizer: Receives the encoder, whose parameters a back end may have replaced.
        max_gradient_norm: Clips the gradient's 2-norm over all that the optimizer trains; None never clips.

    Raises:
        SettingsError: see `require_supported`.
        ResourceError: a library is missing.
    """
    require_supported(settings, world=world)
    match settings:
        case SingleBackend():
            from training.backends.single import Single

            return Single(encoder, make_optimizer, max_gradient_norm=max_gradient_norm, world=world)
        case DDPBackend():
            from training.backends.ddp import DDP

            return DDP(settings, encoder, make_optimizer, max_gradient_norm=max_gradient_norm, world=world)
        case FSDP2Backend():
            from training.backends.fsdp2 import FSDP2

            return FSDP2(settings, encoder, make_optimizer, max_gradient_norm=max_gradient_norm, world=world)
        case DeepSpeedBackend():
            from training.backends.deepspeed import DeepSpeed

            return DeepSpeed(settings, encoder, make_optimizer, max_gradient_norm=max_gradient_norm, world=world)


def require_supported(
    settings: BackendSettings,
    *,
    world: World,
    loss_learns: bool = False,
    keeps_average: bool = False,
    compiles_backbone: bool = False,
) -> None:
    """Refuses what a back end cannot do, before anything slow.

    Raises:
        SettingsError: says what stands against what.
    """
    where = f"backend {settings.name}"
    if settings.name != "single" and world.size == 1:
        raise SettingsError(
            f"{where} shares the work of several processes, found 1. Start it with lookalike launch, "
            "or set backend.name=single."
        )
    spreads_optimizer = isinstance(settings, FSDP2Backend | DeepSpeedBackend)
    if spreads_optimizer and loss_learns:
        raise SettingsError(
            f"{where} trains the encoder alone, this loss has parameters of its own. Use single or ddp."
        )
    if spreads_optimizer and compiles_backbone:
        raise SettingsError(f"{where} cannot be combined with compute.compiles_backbone. Use single or ddp.")
    if settings.spreads_weights and keeps_average:
        raise SettingsError(
            f"{where} spreads the weights over processes, and average_decay needs them whole. "
            "Use single, ddp, or deepspeed with zero_stage 1 or 2."
        )
    if isinstance(settings, DeepSpeedBackend) and settings.zero_stage != 3 and settings.largest_whole_parameter:
        raise SettingsError(f"{where}: largest_whole_parameter has an effect with zero_stage 3 alone.")


def require_only_encoder(encoder: nn.Module, optimizer: torch.optim.Optimizer, *, name: str) -> None:
    """Raises SettingsError if the optimizer trains anything but the encoder's parameters."""
    own = {id(parameter) for parameter in encoder.parameters()}
    if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
        raise SettingsError(f"backend {name} trains the encoder alone, this loss has parameters of its own.")


def require_equal_passes(encoder: nn.Module, num_chunks: int, num_kept_chunks: int, world: World) -> None:
    """Raises SettingsError on every rank unless all run the same passes; one small message."""
    own = torch.tensor([[num_chunks, min(num_kept_chunks, num_chunks)]], device=chunk_device(encoder))
    found = all_gather_rows(own, world)
    if len(found.unique(dim=0)) > 1:
        raise SettingsError(
            f"ranks run different numbers of chunks, (all, kept) are {[tuple(row) for row in found.tolist()]}, but "
            "each pass gathers weights from all of them. Give every process the same number of pictures, "
            "chunk_size and num_kept_chunks."
        )


def full_encoder(backend: Backend, encoder: Encoder, *, world: World) -> Encoder | None:
    """On the first rank a plain encoder in evaluation mode, on the CPU, to save and embed with; None elsewhere."""
    weights = backend.full_weights()
    if not world.is_first:
        return None
    plain = _plain_encoder(encoder)
    plain.load_state_dict(weights)
    return plain


def full_encoder_everywhere(backend: Backend, encoder: Encoder, *, world: World) -> Encoder:
    """On every rank a plain encoder in evaluation mode, on the encoder's device, to embed with."""
    first = full_encoder(backend, encoder, world=world)
    plain = (first or _plain_encoder(encoder)).to(chunk_device(encoder))
    for value in plain.state_dict().values():
        broadcast_from_first(value, world)
    return plain


def _plain_encoder(encoder: Encoder) -> Encoder:
    with torch.random.fork_rng(devices=[]):  # its first weights, drawn and overwritten, are not training's
        return create_encoder(encoder.settings).eval()
