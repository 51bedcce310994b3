"""Whether a batch still teaches: counts taken while its loss is worked out, which add up over workers."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RankStatistics:
    """Of some queries. `+` joins those of several workers, or of several steps."""

    num_queries: int  # with positives
    num_live_queries: int  # of them, those with a gradient
    # Comparisons of a positive that has a slope with an image of the gallery, and how many of them are in the window of
    # σ, each counted by its steepness 4 σ (1 - σ). Both are 0 where no gradient was asked for.
    num_comparisons: int
    num_in_window: float
    # Of the positives, how many have a rank of 1, of 2 to 3, of 4 to 7 and so on, rounded; up to all samples.
    rank_histogram: tuple[int, ...]

    @property
    def live_fraction(self) -> float:
        """Near 0 the batch teaches nothing: nearly all positives rank far below where the loss cares."""
        return self.num_live_queries / max(self.num_queries, 1)

    @property
    def window_fraction(self) -> float:
        """Near 0 the gradient is the word of few images."""
        return self.num_in_window / max(self.num_comparisons, 1)

    def __add__(self, other: "RankStatistics") -> "RankStatistics":
        histograms = zip_longest(self.rank_histogram, other.rank_histogram, fillvalue=0)
        return RankStatistics(
            num_queries=self.num_queries + other.num_queries,
            num_live_queries=self.num_live_queries + other.num_live_queries,
            num_comparisons=self.num_comparisons + other.num_comparisons,
            num_in_window=self.num_in_window + other.num_in_window,
            rank_histogram=tuple(one + another for one, another in histograms),
        )


def rank_histogram(ranks: Iterable[Float[Tensor, "_"]], *, num_samples: int) -> tuple[int, ...]:
    """How many ranks, rounded, are 1, 2 to 3, 4 to 7 and so on, up to `num_samples`."""
    num_bins = max(num_samples, 1).bit_length()
    counts = torch.zeros(num_bins, dtype=torch.int64)
    for part in ranks:
        # frexp gives [1/2, 1) * 2^exponent, so the exponent of 1 is 1.
        bins = torch.frexp(part.round().clamp(1, num_samples)).exponent.long() - 1
        counts += torch.bincount(bins, minlength=num_bins).cpu()
    return tuple(counts.tolist())
