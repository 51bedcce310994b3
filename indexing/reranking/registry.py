"""Re-ranking of any searcher's hits, by any method."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.reranking.alpha_query_expansion import expand_by_similarity
from indexing.reranking.average_query_expansion import expand_by_average
from indexing.reranking.cosines import cosines
from indexing.reranking.database_augmentation import augmented_vectors
from indexing.reranking.k_reciprocal import reciprocal_scores
from indexing.reranking.settings import (
    AlphaQueryExpansion,
    AverageQueryExpansion,
    DatabaseAugmentation,
    Diffusion,
    KReciprocal,
    RerankSettings,
)
from indexing.searching.searcher import Searcher
from lookalike.exact_search import merge_hits
from lookalike.records import SearchHits, SearchParameters

# Below every cosine, so that what a method cannot place follows what it placed, in its old order.
_NOT_PLACED = -2.0


def search_and_rerank(
    searcher: Searcher,
    queries: Float32[ndarray, "queries dim"],
    parameters: SearchParameters,
    settings: RerankSettings,
) -> SearchHits:
    """Searches as deep as the method needs, and re-ranks; see `rerank`."""
    hits = searcher.search(queries, first_search(settings, parameters))
    return rerank(settings, searcher, queries, hits, parameters)


def first_search(settings: RerankSettings, parameters: SearchParameters) -> SearchParameters:
    """What to search for, so that `rerank` has what it needs to give `parameters.k` hits."""
    match settings:
        case AverageQueryExpansion() | AlphaQueryExpansion():
            return replace(parameters, k=settings.num_neighbours)
    return replace(parameters, k=max(parameters.k, settings.shortlist))


def rerank(
    settings: RerankSettings,
    searcher: Searcher,
    queries: Float32[ndarray, "queries dim"],
    hits: SearchHits,
    parameters: SearchParameters,
) -> SearchHits:
    """The k best of each query after a second look, best first; equal scores are ordered by id.

    No query's answer depends on the others. Where a method searches again, filter, ids and effort of `parameters` hold
    for that as well, so a picture that must not be found has no say in the order of the others.

    Args:
        queries: Of unit length, like the gallery.
        hits: What `first_search` found.

    Returns:
        Scores are the method's own, comparable within one answer only. After query expansion: cosines to the expanded
        query. After database augmentation: cosines of the query to the augmented hits. After k-reciprocal: see
        `reciprocal_scores`. After diffusion: see `diffused_scores`. Hits beyond the shortlist, and those that a walk
        never reaches, follow in their old order with their cosine minus 2.

    Raises:
        KeyError: a hit has left the gallery meanwhile.
    """
    match settings:
        case AverageQueryExpansion(num_neighbours=n):
            return _search_again(searcher, queries, hits, parameters, n, expand_by_average)
        case AlphaQueryExpansion(num_neighbours=n, alpha=alpha):

            def expand(query: ndarray, neighbours: ndarray) -> ndarray:
                return expand_by_similarity(query, neighbours, alpha=alpha)

            return _search_again(searcher, queries, hits, parameters, n, expand)
        case DatabaseAugmentation(shortlist=shortlist):
            ids = np.unique(hits.ids[:, :shortlist])
            ids = ids[ids >= 0]
            augmented = augmented_vectors(searcher, ids, num_neighbours=settings.num_neighbours, parameters=parameters)

            def scores(query: ndarray, own: ndarray) -> ndarray:
                rows = augmented[np.searchsorted(ids, own)]
                similarities: ndarray = np.einsum("nd,d->n", rows, query, dtype=np.float64)
                return similarities

        case KReciprocal(shortlist=shortlist):

            def scores(query: ndarray, own: ndarray) -> ndarray:
                return reciprocal_scores(
                    cosines(np.concatenate([query[None], searcher.vectors_of(own)])),
                    num_neighbours=settings.num_neighbours,
                    num_averaged=settings.num_averaged,
                    cosine_share=settings.cosine_share,
                )

        case Diffusion(shortlist=shortlist):
            # Brings scipy's solvers, for which the other methods need not wait.
            from indexing.reranking.diffusion import diffused_scores

            def scores(query: ndarray, own: ndarray) -> ndarray:
                similarities = cosines(np.concatenate([query[None], searcher.vectors_of(own)]))
                walked = diffused_scores(
                    similarities[1:, 1:],
                    similarities[0, 1:],
                    num_neighbours=settings.num_neighbours,
                    num_seeds=settings.num_seeds,
                    alpha=settings.alpha,
                    gamma=settings.gamma,
                )
                return np.where(walked > 0, walked, similarities[0, 1:] + _NOT_PLACED)

    return _reordered(queries, hits, scores, shortlist=shortlist, k=parameters.k)


def _search_again(
    searcher: Searcher,
    queries: Float32[ndarray, "queries dim"],
    hits: SearchHits,
    parameters: SearchParameters,
    num_neighbours: int,
    expand: Callable[[ndarray, ndarray], ndarray],
) -> SearchHits:
    expanded = np.empty_like(queries)
    for row, query in enumerate(queries):
        expanded[row] = expand(query, searcher.vectors_of(_found(hits.ids[row, :num_neighbours])))
    return searcher.search(expanded, parameters)


def _reordered(
    queries: Float32[ndarray, "queries dim"],
    hits: SearchHits,
    scores: Callable[[ndarray, ndarray], ndarray],
    *,
    shortlist: int,
    k: int,
) -> SearchHits:
    """Gives the first hits of each query new scores, and the others a place behind them."""
    new = hits.scores + np.float32(_NOT_PLACED)
    for row, query in enumerate(queries):
        own = _found(hits.ids[row, :shortlist])
        if len(own):
            # To float32, in which pictures that are equal are so to the last bit, whatever the order of sums.
            new[row, : len(own)] = scores(query, own)
    return merge_hits([SearchHits(hits.ids, new)], k=k)


def _found(ids: Int64[ndarray, "k"]) -> Int64[ndarray, "found"]:
    return ids[ids >= 0]
