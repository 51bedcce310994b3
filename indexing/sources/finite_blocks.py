"""Cuts vectors into parts of bounded size and refuses those that hold NaN or infinity."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from indexing.vector_source import VectorBlock
from lookalike.errors import DataError

_LARGEST_BLOCK_BYTES = 32 << 20  # as float32


def rows_per_block(dim: int) -> int:
    return max(1, _LARGEST_BLOCK_BYTES // (4 * max(dim, 1)))


def finite_blocks(
    vectors: ndarray, ids: Int64[ndarray, "vectors"], *, where: Path, first_row: int = 0
) -> Iterator[VectorBlock]:
    """Parts of `vectors` [vectors, dim] as float32, or float16 where they are stored so; not copied where they fit.

    Args:
        where: The file that the vectors are from, and
        first_row: the row of the first one in it, for the message.

    Raises:
        DataError: a vector holds NaN or infinity; the message names file, row and id.
    """
    step = rows_per_block(vectors.shape[1])
    for start in range(0, len(ids), step):
        part, part_ids = vectors[start : start + step], ids[start : start + step]
        # Foreign files may hold double precision, or numbers of the other byte order.
        if part.dtype not in (np.float32, np.float16):
            part = part.astype(np.float32)
        is_finite = np.isfinite(part).all(axis=1)
        if not is_finite.all():
            row = int(np.argmin(is_finite))
            raise DataError(
                f"{where}: the vector in row {first_row + start + row} (id {int(part_ids[row])}) holds NaN or infinity."
            )
        yield VectorBlock(part, part_ids)
