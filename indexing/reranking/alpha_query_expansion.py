"""Alpha query expansion: first hits join the query, weighted by a power of their similarity.

Source: Radenović, Tolias, Chum 2018, "Fine-tuning CNN Image Retrieval with No Human Annotation", arXiv:1711.02512,
section 5.3 (`alpha-weighted query expansion`).
"""

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from indexing.reranking.average_query_expansion import weighted_direction


def expand_by_similarity(
    query: Float32[ndarray, "dim"], neighbours: Float32[ndarray, "neighbours dim"], *, alpha: float
) -> Float32[ndarray, "dim"]:
    """The query that searches again, of unit length.

    Args:
        query: Of unit length, like the neighbours: its weight is its similarity to itself, 1.
        alpha: Power of the similarities; 0 gives average query expansion. Neighbours that point away never join.
    """
    similarities = np.einsum("nd,d->n", neighbours, query, dtype=np.float64)
    weights = np.where(similarities > 0, np.maximum(similarities, 0) ** alpha, 0.0)
    return weighted_direction(query, neighbours, weights)
