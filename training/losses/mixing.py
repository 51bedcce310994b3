"""Similarity mixup: which rows of a batch are mixed, with which coefficients, and what that does to similarities.

A virtual sample is a point between two images of one class. It is never formed: its similarity to anything is the
same combination of two similarities, so mixing turns the similarities S of a batch into W S Wᵀ, where a row of W
holds the shares of the two images that a sample is made of.

Source: Patel, Tolias, Matas, CVPR 2022, arXiv:2108.11179, similarity mixup, eq. 9 and 10.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from lookalike.counter_random import counter_hash
from training.losses.batch_arguments import check_above_zero
from training.losses.class_rows import group_by_class
from training.losses.sparse_matrix import SparseMatrix, sparse_matrix


def mixing_pairs(labels: Int[Tensor, "batch"]) -> Int[Tensor, "pairs 2"]:
    """All pairs of rows of one class: (i, j) with i < j, in ascending order of (i, j).

    A class of m images gives m(m-1)/2 pairs: a batch with 4 images of each class grows 2.5 times.
    """
    classes = group_by_class(labels)
    pairs = [classes.order.new_empty((0, 2))]
    # One class size at a time: all classes of one size pair the same slots.
    for size in classes.sizes.unique().tolist():
        members = classes.order[classes.sizes[classes.order] == size].view(-1, size)  # [classes, size]
        slots = torch.triu_indices(size, size, offset=1, device=labels.device).T  # [pairs of a class, 2]
        pairs.append(members[:, slots].flatten(0, 1))
    unsorted = torch.cat(pairs)
    return unsorted[torch.argsort(unsorted[:, 0] * len(labels) + unsorted[:, 1])]


def mixing_coefficients(labels: Int[Tensor, "batch"], *, seed: int, step: int) -> Float[Tensor, "pairs"]:
    """Uniform coefficients strictly between 0 and 1, one per pair of `mixing_pairs(labels)`.

    A coefficient is a hash of (seed, step, class label, slot of i, slot of j), a slot being a row's place among the
    rows of its class. There is no generator to save: a resumed run, or one split over other workers, draws the
    same numbers wherever a class keeps the order of its rows.

    Args:
        labels: Class of each row of the whole batch, before any split over workers.
        seed: Of the run, 0 to 2^63 - 1.
        step: Of the optimizer, 0 to 2^63 - 1.

    Returns:
        float32; a conversion to float64 changes nothing.

    Raises:
        ValueError: `seed` or `step` is outside its range.
    """
    uniform = _uniform(labels, mixing_pairs(labels), seed=seed, step=step)
    return torch.from_numpy(uniform.astype(np.float32)).to(labels.device)


@dataclass(frozen=True, slots=True)
class PairMixing:
    """Which pairs are mixed, and how."""

    pairs: Int[Tensor, "pairs 2"]  # (i, j) of one class, some of `mixing_pairs`
    coefficients: Float[Tensor, "pairs"]  # the share of row i, in [0, 1]; 1 minus it that of row j


# Coefficients of all pairs of `mixing_pairs`, or of some of them.
Mixing = Float[Tensor, "pairs"] | PairMixing


def draw_mixing(
    labels: Int[Tensor, "batch"],
    *,
    seed: int,
    step: int,
    share: float = 1.0,
    beta: tuple[float, float] = (1.0, 1.0),
) -> PairMixing:
    """Some pairs, each used with the probability `share`, with coefficients from the Beta(a, b) distribution.

    As with `mixing_coefficients`, everything is a function of seed, step, class and slots, and is the same for every
    layout of processes. Beta(1, 1) with share 1 draws its very numbers; a share leaves the coefficients of the pairs
    that it keeps alone.

    Args:
        labels, seed, step: See `mixing_coefficients`.
        share: Of the virtual samples, those to use: 0 to 1.
        beta: (a, b), above 0: below 1 samples crowd near the images, above 1 in the middle between them.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    for parameter in beta:
        check_above_zero("beta", parameter)
    pairs = mixing_pairs(labels)
    uniform = _uniform(labels, pairs, seed=seed, step=step)
    if beta != (1.0, 1.0):
        quantiles, log_odds = _beta_quantiles(*beta)
        uniform = 1 / (1 + np.exp(-np.interp(uniform, quantiles, log_odds)))
    coefficients = torch.from_numpy(uniform.astype(np.float32)).to(labels.device)
    if share < 1:
        is_used = _uniform(labels, pairs, seed=seed, step=step, purpose=1) < share
        used = torch.from_numpy(is_used).to(labels.device)
        return PairMixing(pairs[used], coefficients[used])
    return PairMixing(pairs, coefficients)


def _uniform(
    labels: Int[Tensor, "batch"], pairs: Int[Tensor, "pairs 2"], *, seed: int, step: int, purpose: int = 0
) -> Float64[ndarray, "pairs"]:
    """Exact in float32, never 0 or 1. Another purpose gives numbers independent of the first."""
    for name, number in (("seed", seed), ("step", step)):
        if not 0 <= number < 2**63:
            raise ValueError(f"{name} must be between 0 and 2^63 - 1, got {number}")
    slots = group_by_class(labels).slots[pairs]
    words = torch.stack([labels[pairs[:, 0]].long(), slots[:, 0], slots[:, 1]]).cpu().numpy()
    hashed = counter_hash(seed, step, *words, *([purpose] if purpose else []))
    # The middle of one of 2^23 equal cells.
    return ((hashed >> np.uint64(41)).astype(np.float64) + 0.5) / 2**23


@functools.lru_cache(maxsize=4)
def _beta_quantiles(a: float, b: float) -> tuple[Float64[ndarray, "points"], Float64[ndarray, "points"]]:
    """The distribution function of Beta(a, b) over log odds, log(x / (1 - x)): (probabilities, log odds), ascending.

    In log odds the density x^a (1 - x)^b is smooth and falls off as exp(a z) and exp(-b z), whatever a and b, so that
    sums over even steps are integrals. Off by 1e-6 in probability where a or b is 0.1, by less above.
    """
    log_odds = np.linspace(-40 - 20 / a, 40 + 20 / b, 1 << 17)
    log_density = -a * np.logaddexp(0, -log_odds) - b * np.logaddexp(0, log_odds)
    density = np.exp(log_density - log_density.max())
    steps = (density[1:] + density[:-1]) / 2
    probabilities = np.concatenate([[0.0], steps.cumsum()]) / steps.sum()
    is_new = np.concatenate([[True], np.diff(probabilities) > 0])
    return probabilities[is_new], log_odds[is_new]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The matrix W: what each sample is made of, two images a row. The batch's own images are the first samples."""

    parents: Int[Tensor, "samples 2"]  # rows of the batch; a real image is its own two parents
    shares: Float[Tensor, "samples 2"]  # (a, 1 - a); (1, 0) for a real image

    def expansion(self) -> SparseMatrix:
        """W [samples, images]: carries what images have to the samples made of them."""
        row_starts = torch.arange(0, self.parents.numel(), 2, device=self.parents.device)
        return SparseMatrix(row_starts=row_starts, columns=self.parents.flatten(), values=self.shares.flatten())

    def reduction(self, *, num_images: int) -> SparseMatrix:
        """Wᵀ [images, samples]: carries a gradient of samples back to their images."""
        samples = torch.arange(len(self.parents), device=self.parents.device).repeat_interleave(2)
        return sparse_matrix(self.parents.flatten(), samples, self.shares.flatten(), num_rows=num_images)

    def select(self, samples: Int[Tensor, "chosen"]) -> tuple["Mixture", Int[Tensor, "images"]]:
        """Some of the samples, and the rows of the batch they are made of, which the new `parents` index."""
        images, parents = self.parents[samples].unique(return_inverse=True)
        return Mixture(parents=parents, shares=self.shares[samples]), images


def mix(pairs: Int[Tensor, "pairs 2"], coefficients: Float[Tensor, "pairs"], *, num_images: int) -> Mixture:
    """A batch followed by one virtual sample per pair: coefficient * first row + (1 - coefficient) * second row."""
    images = torch.arange(num_images, device=pairs.device)
    ones = coefficients.new_ones(num_images)
    return Mixture(
        parents=torch.cat([torch.stack([images, images], dim=1), pairs]),
        shares=torch.cat([torch.stack([ones, 1 - ones], dim=1), torch.stack([coefficients, 1 - coefficients], dim=1)]),
    )
