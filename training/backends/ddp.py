"""DistributedDataParallel around the two passes: one reduction per step, overlapped with the last backward pass."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lookalike.collectives import sum_bucket_over_ranks, sum_over_ranks
from lookalike.encoder import Encoder
from lookalike.world import World
from training.backend_settings import DDPBackend
from training.backends.protocol import MakeOptimizer
from training.backends.single import Single, trained_parameters


class DDP(Single):
    """As `Single`, but messages leave as soon as their gradients are complete.

    DDP announces a reduction in its forward pass. What it wraps here is the identity on the embeddings of the last
    chunk, in a module that owns the encoder's parameters: so the announcement comes right before that chunk's
    backward pass, whether its graph was kept from the first pass or not, and all other passes stay unknown to DDP.
    """

    def __init__(
        self,
        settings: DDPBackend,
        encoder: Encoder,
        make_optimizer: MakeOptimizer,
        *,
        max_gradient_norm: float | None,
        world: World,
    ) -> None:
        super().__init__(encoder, make_optimizer, max_gradient_norm=max_gradient_norm, world=world)
        self._announcement = DistributedDataParallel(_Announcement(encoder), bucket_cap_mb=settings.bucket_megabytes)
        # DDP would average; the parts of the loss are shares of the global mean and must be summed.
        self._announcement.register_comm_hook(None, sum_bucket_over_ranks)
        own = {id(parameter) for parameter in encoder.parameters()}
        self._others = [p for p in trained_parameters(self.optimizer) if id(p) not in own]  # what the loss learns

    def backward_chunk(
        self, embeddings: Float[Tensor, "chunk dim"], gradient: Float[Tensor, "chunk dim"], is_last: bool
    ) -> None:
        if is_last:
            embeddings = self._announcement(embeddings)
        embeddings.backward(gradient)
        if is_last:
            sum_over_ranks([p.grad for p in self._others if p.grad is not None], self._world)


class _Announcement(nn.Module):
    """The identity, by the owner of the encoder's parameters (not of its buffers, which DDP would overwrite)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.owned = nn.ParameterList(encoder.parameters())

    def forward(self, embeddings: Float[Tensor, "chunk dim"]) -> Float[Tensor, "chunk dim"]:
        return embeddings
