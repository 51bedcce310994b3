"""A sparse matrix that multiplies dense ones: weighted sums of rows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class SparseMatrix:
    """Rows of (column, value) entries, compressed by row; a row may be empty or name a column twice.

    Built on `embedding_bag`, which on CPU is deterministic and several times faster than torch's own sparse
    products, and does not warn of a beta state.
    """

    row_starts: Int[Tensor, "rows"]
    columns: Int[Tensor, "entries"]
    values: Float[Tensor, "entries"]

    def times(self, dense: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows dim"]:
        return functional.embedding_bag(
            self.columns, dense, self.row_starts, mode="sum", per_sample_weights=self.values
        )


def sparse_matrix(
    rows: Int[Tensor, "entries"],
    columns: Int[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    *,
    num_rows: int,
) -> SparseMatrix:
    """A matrix with the entries in any order; entries at the same place add up."""
    sorted_rows, by_row = torch.sort(rows, stable=True)
    row_starts = torch.searchsorted(sorted_rows, torch.arange(num_rows, device=rows.device))
    return SparseMatrix(row_starts=row_starts, columns=columns[by_row], values=values[by_row])
