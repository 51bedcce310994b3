"""Soft comparisons on a GPU: all thresholds of a query in one reading of its similarities. Imports Triton.

torch's operations read and write a tile once per threshold and operation, which with similarity mixup is some hundred
times; here a tile is read once for the sums, and twice for the gradient, whose tile is read and written once. No two
programs add to the same place, so that sums repeat to the bit. See docs/decisions/0007-kernels-for-tiles-alone.md.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from training.losses.soft_comparisons import Sigmoid

_ROWS, _COLUMNS, _MOST_POSITIVES = 8, 32, 16
_PULL_ROWS, _PULL_COLUMNS = 32, 64


class TritonComparisons:
    """See `Comparisons`; needs no workspace."""

    def __init__(self, thresholds: Float[Tensor, "queries positives"], sigmoid: Sigmoid) -> None:
        self._thresholds = thresholds.contiguous()
        # A tensor: a number would reach the kernel in float32.
        self._scale = torch.tensor([1 / sigmoid.temperature], dtype=thresholds.dtype, device=thresholds.device)

    def add_sums(
        self,
        sums: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        workspace: list[Float[Tensor, "queries gallery"]],
    ) -> None:
        self._add_row_sums(sums, similarities, of_steepness=False)

    def add_pull(
        self,
        pull: Float[Tensor, "queries gallery"],
        pulls: Float[Tensor, "queries positives"],
        slopes: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        workspace: list[Float[Tensor, "queries gallery"]],
    ) -> None:
        self._add_row_sums(pulls, similarities, of_steepness=True)
        num_rows, num_columns = similarities.shape
        _add_pull_kernel[triton.cdiv(num_rows, _PULL_ROWS), triton.cdiv(num_columns, _PULL_COLUMNS)](
            similarities,
            self._thresholds,
            slopes.contiguous(),
            pull,
            self._scale,
            num_rows,
            num_columns,
            self._thresholds.shape[1],
            *similarities.stride(),
            *pull.stride(),
            ROWS=_PULL_ROWS,
            COLUMNS=_PULL_COLUMNS,
        )

    def _add_row_sums(
        self,
        sums: Float[Tensor, "queries positives"],
        similarities: Float[Tensor, "queries gallery"],
        *,
        of_steepness: bool,
    ) -> None:
        num_rows, num_columns = similarities.shape
        num_positives = self._thresholds.shape[1]
        block = min(_MOST_POSITIVES, triton.next_power_of_2(num_positives))
        _add_row_sums_kernel[triton.cdiv(num_rows, _ROWS), triton.cdiv(num_positives, block)](
            similarities,
            self._thresholds,
            sums,
            self._scale,
            num_rows,
            num_columns,
            num_positives,
            *similarities.stride(),
            *sums.stride(),
            OF_STEEPNESS=of_steepness,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            POSITIVES=block,
        )


@triton.jit
def _add_row_sums_kernel(  # type: ignore[no-untyped-def]
    similarities,  # [rows, columns]
    thresholds,  # [rows, positives], contiguous
    sums,  # [rows, positives]
    scale_place,
    num_rows,
    num_columns,
    num_positives,
    row_stride,
    column_stride,
    sums_row_stride,
    sums_column_stride,
    OF_STEEPNESS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIVES: tl.constexpr,
):
    """Some rows, some positives, all columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    positives = tl.program_id(1) * POSITIVES + tl.arange(0, POSITIVES)
    is_row = rows < num_rows
    is_entry = is_row[:, None] & (positives < num_positives)[None, :]
    scale = tl.load(scale_place)
    bars = tl.load(thresholds + rows[:, None] * num_positives + positives[None, :], mask=is_entry, other=0.0)
    places = sums + rows[:, None] * sums_row_stride + positives[None, :] * sums_column_stride
    total = tl.load(places, mask=is_entry, other=0.0)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_pair = is_row[:, None] & (columns < num_columns)[None, :]
        # What lies outside is infinitely far below.
        values = tl.load(
            similarities + rows[:, None] * row_stride + columns[None, :] * column_stride,
            mask=is_pair,
            other=-float("inf"),
        )
        # An exponential that overflows makes the comparison 0, as it should.
        comparisons = 1 / (1 + tl.exp((bars[:, None, :] - values[:, :, None]) * scale))
        if OF_STEEPNESS:
            comparisons = comparisons * (1 - comparisons)
        total += tl.sum(comparisons, axis=1)
    tl.store(places, total, mask=is_entry)


@triton.jit
def _add_pull_kernel(  # type: ignore[no-untyped-def]
    similarities,  # [rows, columns]
    thresholds,  # [rows, positives], contiguous
    slopes,  # [rows, positives], contiguous
    pull,  # [rows, columns]
    scale_place,
    num_rows,
    num_columns,
    num_positives,
    row_stride,
    column_stride,
    pull_row_stride,
    pull_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows, some columns, all positives."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = rows < num_rows
    is_pair = is_row[:, None] & (columns < num_columns)[None, :]
    scale = tl.load(scale_place)
    values = tl.load(
        similarities + rows[:, None] * row_stride + columns[None, :] * column_stride,
        mask=is_pair,
        other=-float("inf"),
    )
    places = pull + rows[:, None] * pull_row_stride + columns[None, :] * pull_column_stride
    total = tl.load(places, mask=is_pair, other=0.0)
    for positive in range(0, num_positives):
        bars = tl.load(thresholds + rows * num_positives + positive, mask=is_row, other=0.0)
        weights = tl.load(slopes + rows * num_positives + positive, mask=is_row, other=0.0)
        comparisons = 1 / (1 + tl.exp((bars[:, None] - values) * scale))
        total += weights[:, None] * comparisons * (1 - comparisons)
    tl.store(places, total, mask=is_pair)
