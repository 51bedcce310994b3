"""Soft comparisons of a tile of similarities with the thresholds of its queries."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """The σ of a batch."""

    temperature: float
    saturation: float  # how many temperatures from 0 it is flat, see `saturation_of`


def saturation_of(dtype: torch.dtype, num_samples: int) -> float:
    """How many temperatures away from its threshold σ is flat: there, all samples together are below the round-off."""
    return math.log(num_samples / torch.finfo(dtype).eps)


class SoftComparisons:
    """σ((s(q, z) - t) / τ) of a tile, for one threshold t of each query after another.

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

    def begin(
        self, similarities: Float[Tensor, "queries gallery"], workspace: list[Float[Tensor, "queries gallery"]]
    ) -> None:
        """What follows is about these. Both tensors of the workspace are written to until the next `begin`."""
        self._similarities = similarities
        self._exponentials, self._result = workspace
        if self._is_shared:
            torch.sub(self._center, similarities, alpha=self._scale, out=self._exponentials).exp2_()

    def with_positive(self, index: int) -> Float[Tensor, "queries gallery"]:
        """Of the first `num_queries[index]` queries; overwritten by the next call."""
        count = self.num_queries[index]
        result = self._result[:count]
        if self._is_shared:
            offsets = self._offsets[index, :count]
            return torch.add(self._exponentials[:count], offsets, out=result).reciprocal_().mul_(offsets)
        thresholds = self._thresholds[index, :count]
        return torch.sub(self._similarities[:count], thresholds, out=result).div_(self._temperature).sigmoid_()

    def sums_with_positive(self, index: int) -> Float[Tensor, "queries"]:
        """Over the gallery."""
        count = self.num_queries[index]
        if self._is_shared:
            offsets = self._offsets[index, :count]
            reciprocals = torch.add(self._exponentials[:count], offsets, out=self._result[:count]).reciprocal_()
            return reciprocals.sum(1).mul_(offsets[:, 0])
        return self.with_positive(index).sum(1)


class Workspace:
    """Memory for one tile after another: a fresh tensor of 1 MB costs more than what is done to it."""

    def __init__(self, num_buffers: int) -> None:
        self._num_buffers = num_buffers
        self._memory: Tensor | None = None

    def like(self, tile: Float[Tensor, "queries gallery"]) -> list[Float[Tensor, "queries gallery"]]:
        if self._memory is None or self._memory.shape[1] < tile.numel():
            self._memory = tile.new_empty(self._num_buffers, tile.numel())
        return [buffer[: tile.numel()].view(tile.shape) for buffer in self._memory]
