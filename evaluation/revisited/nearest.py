"""The start of each query's ranking, for reports that show it; the numbers come from counting alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from evaluation.revisited.distractors import VectorList
from lookalike.errors import DataError
from lookalike.exact_search import exact_search, merge_hits
from lookalike.records import SearchHits

_BLOCK_ROWS = 8192


def nearest(
    queries: Float[ndarray, "queries dim"],
    database: Float[ndarray, "database dim"],
    distractors: Sequence[Float[ndarray, "_ dim"]],
    *,
    k: int,
) -> SearchHits:
    """The k best of database and distractors for each query, equal scores by row; another pass over all of them.

    Junk is among them. Rows from len(database) on are distractors, in their order.

    Raises:
        DataError: a value is not finite.
        ValueError: dimensions do not fit, or k is below 1.
    """
    own_queries = np.ascontiguousarray(queries, dtype=np.float32)
    vectors = VectorList([database, *distractors])
    block = np.zeros((_BLOCK_ROWS, own_queries.shape[1]), np.float32)
    best = exact_search(own_queries, block[:0], np.zeros(0, np.int64), k=k)
    for start in range(0, len(vectors), _BLOCK_ROWS):
        length = vectors.read_into(block, start)
        if not np.isfinite(block).all():
            raise DataError(f"the vectors of rows {start} to {start + length} hold NaN or infinity.")
        hits = exact_search(own_queries, block[:length], np.arange(start, start + length), k=k)
        best = merge_hits([best, hits], k=k)
    return best
