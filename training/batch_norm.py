"""What batch norms do while training: nothing, or statistics of each chunk and one update a step."""

from collections.abc import Iterable

from torch import Tensor, lerp, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lookalike.collectives import sum_over_ranks
from lookalike.world import World


class BatchNormStatistics:
    """What batch norms do in the two passes over a batch.

    Frozen ones normalise by stored statistics, which never change. Trained ones normalise each chunk by its own, the
    same in both passes since the chunk is the same; what is stored moves once a step, by a norm's momentum, towards
    the mean over all chunks of all processes. So W processes do what one does, as long as their chunks are the same.
    Norms whose parameters are all frozen stay frozen.
    """

    def __init__(self, encoder: nn.Module, *, are_trained: bool) -> None:
        norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
        self._trained = [norm for norm in norms if are_trained and any(p.requires_grad for p in norm.parameters())]
        self._frozen = [norm for norm in norms if norm not in self._trained]
        self._momenta = [norm.momentum if norm.momentum is not None else 0.1 for norm in self._trained]
        self._stored: list[Tensor] = []
        self._num_steps: list[Tensor] = []

    def begin_step(self) -> None:
        """Call after `encoder.train()`. From here on trained norms average the statistics of the chunks they see."""
        for norm in self._frozen:
            norm.eval()
        self._stored = [buffer.clone() for buffer in self._buffers()]
        self._num_steps = [counter.clone() for counter in self._counters()]
        for norm in self._trained:
            norm.reset_running_stats()
            norm.momentum = None  # torch: a plain average over all that is seen

    def end_step(self, world: World) -> None:
        """Moves what is stored towards the step's average over all processes."""
        averages = list(self._buffers())
        sum_over_ranks(averages, world)
        momenta = [momentum for momentum in self._momenta for _ in range(2)]
        for average, stored, momentum in zip(averages, self._stored, momenta, strict=True):
            average.copy_(lerp(stored, average / world.size, momentum))
        for counter, num_steps in zip(self._counters(), self._num_steps, strict=True):
            counter.copy_(num_steps + 1)
        for norm, momentum in zip(self._trained, self._momenta, strict=True):
            norm.momentum = momentum

    def _buffers(self) -> Iterable[Tensor]:
        """Means and variances in turn."""
        for norm in self._trained:
            assert norm.running_mean is not None  # timm's norms keep statistics
            assert norm.running_var is not None
            yield norm.running_mean
            yield norm.running_var

    def _counters(self) -> Iterable[Tensor]:
        for norm in self._trained:
            assert norm.num_batches_tracked is not None
            yield norm.num_batches_tracked
