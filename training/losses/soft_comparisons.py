"""Soft comparisons of a tile of similarities with the thresholds of its queries."""

import importlib.util
import logging
import math
import os
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """The σ of a batch."""

    temperature: float
    saturation: float  # how many temperatures from 0 it is flat, see `saturation_of`


def saturation_of(dtype: torch.dtype, num_samples: int) -> float:
    """How many temperatures away from its threshold σ is flat: there, all samples together are below the round-off."""
    return math.log(num_samples / torch.finfo(dtype).eps)


@runtime_checkable
class Comparisons(Protocol):
    """σ((s(q, z) - t) / τ) of tiles of the same queries, for each of their thresholds t, and σ' = σ (1 - σ)."""

    def add_sums(
        self,
        sums: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        workspace: list[Float[Tensor, "queries gallery"]],
    ) -> None:
        """Adds Σ σ over the gallery to `sums`. Both tensors of the workspace may be written to."""
        ...

    def add_pull(
        self,
        pull: Float[Tensor, "queries gallery"],
        pulls: Float[Tensor, "queries positives"],
        slopes: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        workspace: list[Float[Tensor, "queries gallery"]],
    ) -> None:
        """Adds Σ slope * σ' over positives to `pull`, and Σ σ' over the gallery to `pulls`; workspace as above.

        Slopes are 0 where a threshold is not served; what is added to `pulls` there means nothing.
        """
        ...


def soft_comparisons(
    thresholds: Float[Tensor, "queries positives"],
    sigmoid: Sigmoid,
    *,
    is_served: Bool[Tensor, "queries positives"],
) -> Comparisons:
    """By a kernel where there is a GPU, Triton and a C compiler, else by torch's operations.

    Args:
        is_served: Thresholds that matter. Sums for the others mean nothing.
    """
    if thresholds.is_cuda and _can_launch_kernels():
        from training.losses.triton_comparisons import TritonComparisons

        return TritonComparisons(thresholds, sigmoid)
    return TorchComparisons(thresholds, sigmoid, is_served=is_served)


@cache
def _can_launch_kernels() -> bool:
    """Warns, once, where Triton is there in vain."""
    if importlib.util.find_spec("triton") is None:
        return False
    # Where Triton looks, when a kernel's first launch has to build what calls it.
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return True
    logger.warning(
        "Triton finds no C compiler, so torch's slower operations compute the loss. Install gcc, or name one in CC."
    )
    return False


class TorchComparisons:
    """One threshold of each query after another.

    One exponential serves all thresholds: with c the middle between the highest and the lowest of a row,
    e = exp((c - s) / τ) and b = exp((c - t) / τ), the comparison is b / (b + e). An e that overflows or vanishes is so
    far from every b that it makes the comparison 0 or 1, as it should.
    """

    def __init__(
        self,
        thresholds: Float[Tensor, "queries positives"],
        sigmoid: Sigmoid,
        *,
        is_served: Bool[Tensor, "queries positives"],
    ) -> None:
        self._temperature = sigmoid.temperature
        # As many of the first queries are served by a first positive, a second and so on.
        places = torch.arange(1, len(thresholds) + 1, device=is_served.device)[:, None]
        self.num_queries: list[int] = (is_served * places).amax(0).tolist()
        highest = torch.where(is_served, thresholds, -math.inf).amax(1, keepdim=True)
        highest = torch.where(highest.isinf(), 0, highest)  # of a query without any
        # In the place of a threshold that is not served, any number will do.
        thresholds = torch.where(is_served, thresholds, highest)
        center = (highest + thresholds.amin(1, keepdim=True)) / 2
        self._scale = 1 / (self._temperature * math.log(2))  # exp2 is more than twice as fast as exp
        spread = float((highest - center).max()) / self._temperature
        # Beyond, an e that overflows could still matter to the lowest threshold.
        self._is_shared = spread + sigmoid.saturation <= math.log(torch.finfo(center.dtype).max)
        self._center = center * self._scale
        # [positives, queries, 1]: an operation on a tile turned over is fast only where queries are contiguous.
        self._thresholds = thresholds.T.contiguous()[:, :, None]
        self._offsets = (center - thresholds).mul_(self._scale).exp2_().T.contiguous()[:, :, None]

    def add_sums(
        self,
        sums: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        workspace: list[Float[Tensor, "queries gallery"]],
    ) -> None:
        self._begin(similarities, workspace)
        for index, count in enumerate(self.num_queries):
            sums[:count, index] += self._sums_with_positive(index)

    def add_pull(
        self,
        pull: Float[Tensor, "queries gallery"],
        pulls: Float[Tensor, "queries positives"],
        slopes: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        workspace: list[Float[Tensor, "queries gallery"]],
    ) -> None:
        self._begin(similarities, workspace)
        by_positive = slopes.T.contiguous()[:, :, None]
        for index, count in enumerate(self.num_queries):
            steepness = self._with_positive(index)
            steepness.addcmul_(steepness, steepness, value=-1)
            pull[:count].addcmul_(steepness, by_positive[index, :count])
            pulls[:count, index] += steepness.sum(1)

    def _begin(
        self, similarities: Float[Tensor, "queries gallery"], workspace: list[Float[Tensor, "queries gallery"]]
    ) -> None:
        """What follows is about these."""
        self._similarities = similarities
        self._exponentials, self._result = workspace
        if self._is_shared:
            torch.sub(self._center, similarities, alpha=self._scale, out=self._exponentials).exp2_()

    def _with_positive(self, index: int) -> Float[Tensor, "queries gallery"]:
        """Of the first `num_queries[index]` queries; overwritten by the next call."""
        count = self.num_queries[index]
        result = self._result[:count]
        if self._is_shared:
            offsets = self._offsets[index, :count]
            return torch.add(self._exponentials[:count], offsets, out=result).reciprocal_().mul_(offsets)
        thresholds = self._thresholds[index, :count]
        return torch.sub(self._similarities[:count], thresholds, out=result).div_(self._temperature).sigmoid_()

    def _sums_with_positive(self, index: int) -> Float[Tensor, "queries"]:
        """Over the gallery."""
        count = self.num_queries[index]
        if self._is_shared:
            offsets = self._offsets[index, :count]
            reciprocals = torch.add(self._exponentials[:count], offsets, out=self._result[:count]).reciprocal_()
            return reciprocals.sum(1).mul_(offsets[:, 0])
        return self._with_positive(index).sum(1)


class Workspace:
    """Memory for one tile after another: a fresh tensor of 1 MB costs more than what is done to it."""

    def __init__(self, num_buffers: int) -> None:
        self._num_buffers = num_buffers
        self._memory: Tensor | None = None

    def like(self, tile: Float[Tensor, "queries gallery"]) -> list[Float[Tensor, "queries gallery"]]:
        if self._memory is None or self._memory.shape[1] < tile.numel():
            self._memory = tile.new_empty(self._num_buffers, tile.numel())
        return [buffer[: tile.numel()].view(tile.shape) for buffer in self._memory]
