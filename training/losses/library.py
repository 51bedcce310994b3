"""Losses to compare with, from pytorch-metric-learning, an optional dependency; the only file that imports it.

None of them is a sum over queries, or not one that the library can split, so every process computes the whole.

Sources: Hadsell et al. 2006 (contrastive); Wang et al. 2020, arXiv:1912.06798 (cross-batch memory); Schroff et al.
2015, arXiv:1503.03832 (triplet); Wu et al. 2017, arXiv:1706.07567 (margin); Wang et al. 2019, arXiv:1904.06627
(multi-similarity); Teh et al. 2020, arXiv:2004.01113 (ProxyNCA++); Zhai and Wu 2019, arXiv:1811.12649 (normalised
softmax); Cakir et al. 2019 (FastAP).
"""

import importlib.util
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lookalike.counter_random import counter_hash
from lookalike.errors import ResourceError
from training.losses.batch_loss import BatchLoss, LossShare, share_of_whole


class LibraryLoss(BatchLoss):
    """A loss of the library, optionally on mined pairs or triplets only, whose floor is 0 or unknown."""

    def __init__(
        self,
        loss: nn.Module,
        *,
        miner: nn.Module | None = None,
        classes: Int64[Tensor, "classes"] | None = None,
        floor: float | None = None,
        lr_multiplier: float = 1.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            loss: Takes embeddings, labels and the miner's indices.
            miner: May draw from torch's global generator, whose state is its own in every step.
            classes: All labels there are, ascending, for a loss that has parameters for each.
        """
        super().__init__()
        self.loss = loss
        self._miner = miner
        self._classes = classes
        self._floor = floor
        self._seed = seed
        self.lr_multiplier = lr_multiplier

    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        if self._classes is not None:
            labels = torch.searchsorted(self._classes.to(labels.device), labels)
        mined = self._mine(embeddings, labels, step)
        return share_of_whole(lambda rows: self.loss(rows, labels, mined), embeddings, share=share)

    def floor(self, labels: Int64[Tensor, "batch"], *, step: int) -> float | None:
        return self._floor

    def _mine(self, embeddings: Tensor, labels: Tensor, step: int) -> tuple[Tensor, ...] | None:
        if self._miner is None:
            return None
        devices = [embeddings.device] if embeddings.is_cuda else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(int(counter_hash(self._seed, step)) >> 32)
            mined: tuple[Tensor, ...] = self._miner(embeddings, labels)
        return mined


class RememberingLoss(BatchLoss):
    """A loss of pairs of the batch with a memory of earlier batches (cross-batch memory)."""

    def __init__(self, loss: nn.Module, *, dim: int, memory_size: int, start_step: int, floor: float | None) -> None:
        super().__init__()
        losses, _ = _library()
        self.loss = loss
        self.memory = losses.CrossBatchMemory(loss, embedding_size=dim, memory_size=memory_size)
        self._start_step = start_step
        self._floor = floor

    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        loss = self.loss if step < self._start_step else self.memory
        return share_of_whole(lambda rows: loss(rows, labels), embeddings, share=share)

    def floor(self, labels: Int64[Tensor, "batch"], *, step: int) -> float | None:
        return self._floor

    # The library saves what the memory holds, but not how far it is filled.
    def get_extra_state(self) -> dict[str, Any]:
        return {"next": self.memory.queue_idx, "is_full": self.memory.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.memory.queue_idx, self.memory.has_been_filled = state["next"], state["is_full"]


def contrastive_loss(
    *, positive_margin: float, negative_margin: float, memory_size: int | None, start_step: int, dim: int
) -> BatchLoss:
    losses, _ = _library()
    from pytorch_metric_learning.distances import CosineSimilarity

    loss = losses.ContrastiveLoss(pos_margin=positive_margin, neg_margin=negative_margin, distance=CosineSimilarity())
    if memory_size is None:
        return LibraryLoss(loss, floor=0.0)
    return RememberingLoss(loss, dim=dim, memory_size=memory_size, start_step=start_step, floor=0.0)


def triplet_loss(*, margin: float, triplets: Literal["semihard", "hard", "all"]) -> BatchLoss:
    losses, miners = _library()
    miner = miners.TripletMarginMiner(margin=margin, type_of_triplets=triplets)
    return LibraryLoss(losses.TripletMarginLoss(margin=margin), miner=miner, floor=0.0)


def margin_loss(
    *,
    margin: float,
    boundary: float,
    learns_boundary: bool,
    triplets: Literal["distance_weighted", "all"],
    lr_multiplier: float,
    seed: int,
) -> BatchLoss:
    losses, miners = _library()
    loss = losses.MarginLoss(margin=margin, beta=boundary, learn_beta=learns_boundary)
    miner = miners.DistanceWeightedMiner() if triplets == "distance_weighted" else None
    return LibraryLoss(loss, miner=miner, floor=0.0, lr_multiplier=lr_multiplier, seed=seed)


def multi_similarity_loss(
    *, positive_scale: float, negative_scale: float, boundary: float, mining_margin: float | None
) -> BatchLoss:
    losses, miners = _library()
    loss = losses.MultiSimilarityLoss(alpha=positive_scale, beta=negative_scale, base=boundary)
    miner = None if mining_margin is None else miners.MultiSimilarityMiner(epsilon=mining_margin)
    return LibraryLoss(loss, miner=miner)


def proxy_nca_loss(*, scale: float, classes: Int64[Tensor, "classes"], dim: int, lr_multiplier: float) -> BatchLoss:
    """The proxies start random (torch's global generator)."""
    losses, _ = _library()
    loss = losses.ProxyNCALoss(num_classes=len(classes), embedding_size=dim, softmax_scale=scale)
    return LibraryLoss(loss, classes=classes, lr_multiplier=lr_multiplier)


def normalised_softmax_loss(
    *, temperature: float, classes: Int64[Tensor, "classes"], dim: int, lr_multiplier: float
) -> BatchLoss:
    """The class weights start random (torch's global generator)."""
    losses, _ = _library()
    loss = losses.NormalizedSoftmaxLoss(num_classes=len(classes), embedding_size=dim, temperature=temperature)
    return LibraryLoss(loss, classes=classes, lr_multiplier=lr_multiplier)


def fast_ap_loss(*, num_bins: int) -> BatchLoss:
    losses, _ = _library()
    return LibraryLoss(losses.FastAPLoss(num_bins=num_bins))


def _library() -> tuple[Any, Any]:
    """Its losses and miners.

    Raises:
        ResourceError: it is not installed.
    """
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        raise ResourceError(
            "this loss comes from pytorch-metric-learning, which is not installed. "
            "Install lookalike with the extra [compared]: pip install 'lookalike[compared]'."
        )
    from pytorch_metric_learning import losses, miners

    return losses, miners
