"""The rows of a batch, class by class."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClassRows:
    """Where the classes of a batch lie. Labels may come in any order, classes in any size.

    The *slot* of a row is its place among the rows of its class, in order of rows.
    """

    order: Int[Tensor, "rows"]  # all rows, class after class by label, each class in order of rows
    starts: Int[Tensor, "rows"]  # of each row: where its class begins in `order`
    sizes: Int[Tensor, "rows"]  # of each row: how many rows its class has, itself included
    slots: Int[Tensor, "rows"]  # of each row: its slot

    def others(
        self, rows: Int[Tensor, "queries"]
    ) -> tuple[Int[Tensor, "queries positives"], Bool[Tensor, "queries positives"]]:
        """The other rows of each row's class, as wide as the largest class asked for, and which entries are real.

        Entries that are not real hold some valid row; real ones come first.
        """
        num_others = (self.sizes[rows] - 1)[:, None]
        places = torch.arange(int(num_others.max()) if len(rows) else 0, device=rows.device)
        is_other = places < num_others
        places = places + (places >= self.slots[rows][:, None])  # steps over the row itself
        return self.order[self.starts[rows][:, None] + torch.where(is_other, places, 0)], is_other


def group_by_class(labels: Int[Tensor, "rows"]) -> ClassRows:
    order = torch.argsort(labels, stable=True)
    _, class_of_row, class_sizes = labels.unique(return_inverse=True, return_counts=True)
    starts = (class_sizes.cumsum(0) - class_sizes)[class_of_row]
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    return ClassRows(order=order, starts=starts, sizes=class_sizes[class_of_row], slots=slots - starts)
