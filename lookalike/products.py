"""Large matrix products of arrays, on all cores this process may use.

numpy's own library has one thread in our commands, see `native_libraries.set_thread_policy`; what is large goes to
torch, whose waiting threads sleep.
"""

from typing import TYPE_CHECKING

from jaxtyping import Float
from numpy import ndarray

from lookalike.native_libraries import uses_torch

if TYPE_CHECKING:
    import torch


def product(
    left: Float[ndarray, "rows inner"], right: Float[ndarray, "inner columns"]
) -> Float[ndarray, "rows columns"]:
    """`left @ right`; either may be memory-mapped or a transposed view."""
    if not uses_torch() or left.dtype != right.dtype:  # torch multiplies equal types only
        by_numpy: ndarray = left @ right
        return by_numpy
    result: ndarray = (as_tensor(left) @ as_tensor(right)).numpy()
    return result


def as_tensor(block: ndarray) -> "torch.Tensor":
    """A torch tensor over the same memory, which nobody may write to."""
    import torch  # brought by few of those who import this

    if block.flags.writeable:
        return torch.from_numpy(block)
    try:
        # from_numpy warns of memory that is mapped for reading.
        return torch.utils.dlpack.from_dlpack(block)
    except (BufferError, TypeError):  # numpy before 2.1 does not lend such memory
        return torch.from_numpy(block.copy())
