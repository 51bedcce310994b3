"""Bootstrap intervals of a mean, by clusters of queries that err together."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

_NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the bounds of its 95% interval, in the unit of the values; NaN bounds where nothing is known."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Float64[ndarray, "queries"],
    clusters: Int64[ndarray, "queries"],
    *,
    seed: int = 0,
    num_resamples: int = _NUM_RESAMPLES,
) -> Estimate:
    """Mean of `values` and its 95% percentile interval over resampled clusters.

    Queries of one class share gallery and look, so they err together: resampling single queries would give intervals
    that are too narrow. One cluster per query gives the plain bootstrap. NaN values leave mean and resamples.

    Source: Davison, Hinkley 1997, "Bootstrap Methods and their Application", section 3.8 (cluster resampling) and 5.3.

    Raises:
        ValueError: there is no value that is not NaN.
    """
    counted = ~np.isnan(values)
    if not counted.any():
        raise ValueError("no query has a value: none has a relevant image")
    _, members = np.unique(clusters[counted], return_inverse=True)
    sums = np.bincount(members, weights=values[counted])
    counts = np.bincount(members).astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Estimate(mean, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for resample in range(num_resamples):
        drawn = generator.integers(0, len(sums), len(sums))
        means[resample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))
