"""Losses of ranks for the training loop, whose temperatures and depths may change while training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from training.losses.batch_loss import BatchLoss, LossShare
from training.losses.blackbox_ap import blackbox_average_precision_with_gradient
from training.losses.mixing import PairMixing, draw_mixing
from training.losses.rank_statistics import RankStatistics
from training.losses.recall_at_k import Definition, recall_at_k_with_gradient, surrogate_floor
from training.losses.smooth_ap import smooth_average_precision_with_gradient
from training.losses.smooth_ranks import RankLoss
from training.schedules import KsSchedule, Schedule

LIVE_FRACTION = "live_fraction"


@dataclass(frozen=True, slots=True)
class SimilarityMixup:
    """SiMix: the virtual samples that each step's batch gets, see `draw_mixing`."""

    seed: int
    share: float = 1.0
    beta: tuple[float, float] = (1.0, 1.0)

    def draw(self, labels: Int64[Tensor, "batch"], *, step: int) -> PairMixing:
        return draw_mixing(labels, seed=self.seed, step=step, share=self.share, beta=self.beta)


class ScheduledRankLoss(BatchLoss):
    """A loss split over processes by queries, with numbers that change; subclasses say which loss."""

    def __init__(self, **schedules: Schedule) -> None:
        super().__init__()
        self._schedules = schedules

    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        numbers = {name: schedule.at(step) for name, schedule in self._schedules.items()}
        result = self.rank_loss(embeddings, labels, share=share, step=step, **numbers)
        assert result.gradient is not None  # it was asked for
        return LossShare(result.loss, result.gradient, counts_of(result.statistics))

    def rank_loss(
        self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int, **numbers: float
    ) -> RankLoss:
        """The loss and its gradient, with this step's value of each schedule."""
        raise NotImplementedError

    def numbers(self, *, step: int) -> dict[str, float]:
        return {name: schedule.at(step) for name, schedule in self._schedules.items()}

    def observe(self, shares: Mapping[str, float]) -> None:
        for schedule in self._schedules.values():
            schedule.observe(shares[LIVE_FRACTION])

    def get_extra_state(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self._schedules.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, schedule in self._schedules.items():
            schedule.load_state_dict(state[name])


class ScheduledRecallAtK(ScheduledRankLoss):
    """`recall_at_k_with_gradient`."""

    def __init__(
        self,
        *,
        ks: KsSchedule,
        rank_temperature: Schedule,
        k_temperature: Schedule,
        definition: Definition,
        mixup: SimilarityMixup | None,
    ) -> None:
        super().__init__(rank_temperature=rank_temperature, k_temperature=k_temperature)
        self._ks = ks
        self._definition: Definition = definition
        self._mixup = mixup

    def rank_loss(
        self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int, **numbers: float
    ) -> RankLoss:
        mixing = self._mixup.draw(labels, step=step) if self._mixup else None
        return recall_at_k_with_gradient(
            embeddings,
            labels,
            ks=self._ks.at(step),
            rank_temperature=numbers["rank_temperature"],
            k_temperature=numbers["k_temperature"],
            definition=self._definition,
            mixing=mixing,
            query_share=share,
        )

    def floor(self, labels: Int64[Tensor, "batch"], *, step: int) -> float:
        mixes_some = self._mixup is not None and self._mixup.share < 1  # their number changes from step to step
        return surrogate_floor(
            labels,
            ks=self._ks.at(step),
            k_temperature=self._schedules["k_temperature"].at(step),
            definition=self._definition,
            is_mixed=self._mixup is not None,
            mixing=self._mixup.draw(labels, step=step) if self._mixup and mixes_some else None,
        )

    def numbers(self, *, step: int) -> dict[str, float]:
        return {**super().numbers(step=step), "largest_k": float(max(self._ks.at(step)))}


class ScheduledSmoothAP(ScheduledRankLoss):
    """`smooth_average_precision_with_gradient`."""

    def __init__(self, *, rank_temperature: Schedule, mixup: SimilarityMixup | None) -> None:
        super().__init__(rank_temperature=rank_temperature)
        self._mixup = mixup

    def rank_loss(
        self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int, **numbers: float
    ) -> RankLoss:
        mixing = self._mixup.draw(labels, step=step) if self._mixup else None
        return smooth_average_precision_with_gradient(
            embeddings, labels, rank_temperature=numbers["rank_temperature"], mixing=mixing, query_share=share
        )

    def floor(self, labels: Int64[Tensor, "batch"], *, step: int) -> float:
        return 0.0


class BlackboxAP(ScheduledRankLoss):
    """`blackbox_average_precision_with_gradient`; nothing of it changes."""

    def __init__(self, *, interpolation: float, margin: float) -> None:
        super().__init__()
        self._interpolation = interpolation
        self._margin = margin

    def rank_loss(
        self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int, **numbers: float
    ) -> RankLoss:
        return blackbox_average_precision_with_gradient(
            embeddings, labels, interpolation=self._interpolation, margin=self._margin, query_share=share
        )

    def floor(self, labels: Int64[Tensor, "batch"], *, step: int) -> float:
        return 0.0


def counts_of(statistics: RankStatistics) -> dict[str, tuple[float, float]]:
    """Shares of queries with a gradient, of comparisons in the window of σ, and of positives by their rank."""
    histogram = statistics.rank_histogram
    num_ranks = float(sum(histogram))
    return {
        LIVE_FRACTION: (float(statistics.num_live_queries), float(statistics.num_queries)),
        "window_fraction": (float(statistics.num_in_window), float(statistics.num_comparisons)),
        **{f"ranked_from_{2**place}": (float(count), num_ranks) for place, count in enumerate(histogram)},
    }
