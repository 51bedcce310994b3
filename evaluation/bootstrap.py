"""Bootstrap intervals of means, by clusters of queries that err together."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

_NUM_RESAMPLES = 2000
_DRAWS_AT_A_TIME = 1 << 20


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
    """`bootstrap_means` of one metric."""
    return bootstrap_means(values[:, None], clusters, seed=seed, num_resamples=num_resamples)[0]


def bootstrap_means(
    values: Float64[ndarray, "queries metrics"],
    clusters: Int64[ndarray, "queries"],
    *,
    seed: int = 0,
    num_resamples: int = _NUM_RESAMPLES,
) -> list[Estimate]:
    """Mean of each column and its 95% percentile interval over resampled clusters, the same ones for all columns.

    Queries of one class share gallery and look, so they err together: resampling single queries would give intervals
    that are too narrow. One cluster per query gives the plain bootstrap. NaN values leave mean and resamples.

    Source: Davison, Hinkley 1997, "Bootstrap Methods and their Application", section 3.8 (cluster resampling) and 5.3.

    Raises:
        ValueError: a column has no value that is not NaN.
    """
    is_known = ~np.isnan(values)
    if not is_known.any(axis=0).all():
        raise ValueError("no query has a value: none has a relevant image")
    # A cluster without a known value in any column is none of the sample.
    kept = is_known.any(axis=1)
    _, members = np.unique(clusters[kept], return_inverse=True)
    num_clusters = int(members.max()) + 1
    sums, counts = np.zeros((num_clusters, values.shape[1])), np.zeros((num_clusters, values.shape[1]))
    np.add.at(sums, members, np.where(is_known, values, 0.0)[kept])
    np.add.at(counts, members, is_known[kept].astype(np.float64))
    means = sums.sum(axis=0) / counts.sum(axis=0)
    if num_clusters == 1:
        return [Estimate(float(mean), np.nan, np.nan) for mean in means]
    generator = np.random.default_rng(seed)
    resampled = []
    at_a_time = max(1, _DRAWS_AT_A_TIME // num_clusters)
    for start in range(0, num_resamples, at_a_time):
        num_rows = min(at_a_time, num_resamples - start)
        drawn = generator.integers(0, num_clusters, (num_rows, num_clusters))
        drawn += num_clusters * np.arange(num_rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=num_rows * num_clusters).reshape(num_rows, num_clusters)
        with np.errstate(invalid="ignore"):  # a resample without any known value of a metric says nothing of it
            resampled.append((times @ sums) / (times @ counts))
    low, high = np.nanquantile(np.concatenate(resampled), [0.025, 0.975], axis=0)
    return [Estimate(*map(float, bounds)) for bounds in zip(means, low, high, strict=True)]
