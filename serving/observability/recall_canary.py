"""Whether searches still find what exact search finds: stored queries, asked both ways while the server runs."""

from collections.abc import Sequence

import numpy as np

from indexing.searching.searcher import Searcher
from lookalike.records import SearchParameters


def canary_recall(searcher: Searcher, ids: Sequence[int], *, k: int) -> float | None:
    """Share of the `k` exact nearest that a search at the default effort finds, over the pictures of `ids`.

    None where none of them is in the gallery any more. Exact search reads every vector of the gallery.

    Args:
        searcher: One that stays as it is: with a change between the two searches, both would be right and differ.
    """
    vectors = []
    for identifier in ids:
        try:
            vectors.append(searcher.vectors_of(np.array([identifier], np.int64)))
        except KeyError:
            continue  # deleted since the version was built
    if not vectors:
        return None
    queries = np.concatenate(vectors)
    found = searcher.search(queries, SearchParameters(k=k)).ids
    nearest = searcher.search(queries, SearchParameters(k=k, exact=True)).ids
    shares = [np.isin(n[n >= 0], f).mean() for f, n in zip(found, nearest, strict=True)]
    return float(np.mean(shares))
