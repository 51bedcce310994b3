"""Judges the lists of an index or a server, which end before the gallery does."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64
from numpy import ndarray

from evaluation.classes.pictures import RelevantRows, checked_classes, listed
from evaluation.classes.positions import require_ks
from evaluation.result import Section
from lookalike.errors import DataError
from lookalike.ranking_metrics import bounds, class_metrics, positions_in_list
from lookalike.records import SearchHits


def judge_rankings(
    ranked_ids: Int[ndarray, "_ _"],
    query_ids: Int[ndarray, "_"],
    query_labels: Int[ndarray, "_"],
    gallery_ids: Int[ndarray, "_"],
    gallery_labels: Int[ndarray, "_"],
    *,
    ks: Sequence[int],
    names: Sequence[str] | None = None,
) -> Section:
    """What lists of ranked ids say about every metric.

    A metric that the lists decide for every query is in `per_query`; of any other, `bounds` holds the least and the
    greatest value that the rest of the ranking allows. Queries without a relevant picture have no value (NaN).

    Args:
        ranked_ids: [queries, depth], best first; -1 where there are no more. Where the gallery holds the query, its id
            may be in its list or not: it is removed by id. To decide hit_rate@k a list needs k others.
        gallery_ids: All pictures that a list may name.
        ks: See `leave_one_out`.
        names: Of the queries; ids as text where None.

    Raises:
        DataError: shapes or types do not fit, an id is unknown or named twice by a list, a picture has no class, or no
            query has a relevant picture.
    """
    own_query_ids, own_query_labels = checked_classes("queries", query_ids, query_labels)
    own_gallery_ids, own_gallery_labels = checked_classes("gallery", gallery_ids, gallery_labels)
    if ranked_ids.ndim != 2 or len(ranked_ids) != len(own_query_ids):
        raise DataError(f"rankings have shape {ranked_ids.shape}, expected {len(own_query_ids)} rows.")
    own_names = tuple(str(own) for own in own_query_ids.tolist()) if names is None else tuple(names)
    if len(own_names) != len(own_query_ids):
        raise DataError(f"{len(own_names)} names for {len(own_query_ids)} queries.")
    unknown = np.setdiff1d(ranked_ids[ranked_ids >= 0], own_gallery_ids)
    if len(unknown):
        raise DataError(f"rankings name ids that the gallery does not hold: {listed(unknown)}.")
    relevant = RelevantRows(own_gallery_ids, own_gallery_labels, own_query_ids, own_query_labels)
    if not relevant.counts.any():
        raise DataError("no query has a picture of its class in the gallery.")
    require_ks(ks)
    metrics = class_metrics(ks)
    extremes = np.full((len(metrics), len(own_query_ids), 2), np.nan)
    for query in np.flatnonzero(relevant.counts).tolist():
        try:
            found, depth = positions_in_list(
                ranked_ids[query].astype(np.int64), own_gallery_ids[relevant[query]], own_query_ids[query : query + 1]
            )
        except ValueError as error:
            raise DataError(f"query {own_names[query]}: {error}.") from error
        num_ranked = len(own_gallery_ids) - int(relevant.own[query] >= 0)
        for row, metric in enumerate(metrics.values()):
            extremes[row, query] = bounds(
                metric, found, num_relevant=int(relevant.counts[query]), depth=depth, num_ranked=num_ranked
            )
    decided: dict[str, Float64[ndarray, queries]] = {}
    bounded: dict[str, Float64[ndarray, "queries 2"]] = {}
    for name, values in zip(metrics, extremes, strict=True):
        if np.array_equal(values[:, 0], values[:, 1], equal_nan=True):
            decided[name] = values[:, 0]
        else:
            bounded[name] = values
    facts = {
        "num_gallery": len(own_gallery_ids),
        "num_unanswerable": int((relevant.counts == 0).sum()),
        "depth": ranked_ids.shape[1],
    }
    return Section(own_names, own_query_labels, decided, bounded, facts)


def without_query(hits: SearchHits, query_ids: Int64[ndarray, "queries"]) -> SearchHits:
    """Takes each query out of its own list by id; a list that lacks it loses its last place instead."""
    is_query = hits.ids == query_ids[:, None]
    is_query[~is_query.any(axis=1), -1] = True
    shape = (len(query_ids), hits.ids.shape[1] - 1)
    return SearchHits(hits.ids[~is_query].reshape(shape), hits.scores[~is_query].reshape(shape))


def recall_against_exact(ranked_ids: Int64[ndarray, "queries depth"], exact_ids: Int64[ndarray, "queries k"]) -> float:
    """Share of the exact k nearest that are among the first k of the rankings, over all queries.

    Args:
        ranked_ids: Of an approximate search; at least k columns, -1 where it found no more.
        exact_ids: -1 where the gallery holds fewer than k.

    Raises:
        ValueError: the rankings are shorter than k, or the exact ones name nothing.
    """
    k = exact_ids.shape[1]
    if ranked_ids.shape[1] < k:
        raise ValueError(f"rankings of {ranked_ids.shape[1]} cannot hold the {k} nearest")
    num_exact = int((exact_ids >= 0).sum())
    if not num_exact:
        raise ValueError("there are no exact neighbours to find")
    num_found = sum(
        np.count_nonzero(np.isin(exact[exact >= 0], ranked))
        for ranked, exact in zip(ranked_ids[:, :k], exact_ids, strict=True)
    )
    return float(num_found / num_exact)
