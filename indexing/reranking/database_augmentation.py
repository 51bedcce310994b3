"""Database augmentation: each picture of the gallery is replaced by a mean over its own neighbours.

Source: Arandjelović, Zisserman 2012, "Three things everyone should know to improve object retrieval", section 5, which
adds neighbours up; the falling weights are those of Gordo, Almazán, Revaud, Larlus 2017, "End-to-end Learning of Deep
Visual Representations for Image Retrieval", arXiv:1610.07940. There the whole gallery is replaced before any search;
here the hits of a query are, when it asks, with equal scores: what is added to the gallery counts at once.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.reranking.average_query_expansion import weighted_direction
from indexing.searching.searcher import Searcher
from lookalike.records import SearchParameters

_VECTORS_AT_A_TIME = 256


def augmented_vectors(
    searcher: Searcher, ids: Int64[ndarray, "n"], *, num_neighbours: int, parameters: SearchParameters
) -> Float32[ndarray, "n dim"]:
    """Unit-length means of the pictures `ids` and of what each of them finds.

    All ids of a gallery give the augmented gallery of the paper, which can be indexed in place of the other.

    Args:
        num_neighbours: Neighbours of weight n / (n + 1), (n - 1) / (n + 1), ... 1 / (n + 1) beside the picture's 1.
        parameters: How neighbours are searched for, and which pictures may be some; its k is not used.

    Raises:
        KeyError: an id is not in the gallery.
    """
    parts = [np.zeros((0, searcher.dim), np.float32)]
    for start in range(0, len(ids), _VECTORS_AT_A_TIME):
        parts.append(_augmented(searcher, ids[start : start + _VECTORS_AT_A_TIME], num_neighbours, parameters))
    return np.concatenate(parts)


def _augmented(
    searcher: Searcher, ids: Int64[ndarray, "n"], num_neighbours: int, parameters: SearchParameters
) -> Float32[ndarray, "n dim"]:
    vectors = searcher.vectors_of(ids)
    # One more, since each picture finds itself; not always first, where others equal it.
    found = searcher.search(vectors, replace(parameters, k=num_neighbours + 1)).ids
    weights = 1 - np.arange(1, num_neighbours + 1) / (num_neighbours + 1)
    augmented = np.empty_like(vectors)
    for row, (own_id, vector) in enumerate(zip(ids, vectors, strict=True)):
        others = found[row][(found[row] >= 0) & (found[row] != own_id)][:num_neighbours]
        augmented[row] = weighted_direction(vector, searcher.vectors_of(others), weights[: len(others)])
    return augmented
