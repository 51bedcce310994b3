"""The protocols of retrieval among pictures with classes: who searches what, and what the numbers are called.

Relevant to a query are the pictures of its class. The query itself is removed by id, never by position: with copies
in the gallery the first hit need not be the query. Scores are inner products, rounded to float32, so vectors of unit
length give cosine similarity.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from numpy import ndarray

from evaluation.classes.pictures import Pictures, RelevantRows, checked_pictures, listed
from evaluation.classes.positions import Ties, place_relevant, require_ks, score_blocks, settle_near_ties
from evaluation.result import Section, mean_of_known
from lookalike.collectives import sum_over_ranks
from lookalike.counter_random import counter_hash
from lookalike.encoder import available_device
from lookalike.errors import DataError
from lookalike.exact_search import float32_screening_error
from lookalike.native_libraries import num_cores
from lookalike.progress import Progress
from lookalike.ranking_metrics import RECALL_LEVELS, class_metrics, precision_at_recall
from lookalike.world import World

_RECALL_COLUMNS = [f"precision at recall {level:.2f}" for level in RECALL_LEVELS]


def leave_one_out(
    vectors: Float[ndarray, "_ _"],
    ids: Int[ndarray, "_"],
    labels: Int[ndarray, "_"],
    *,
    ks: Sequence[int],
    ties: Ties = "index",
    names: Sequence[str] | None = None,
    world: World = World(),
) -> Section:
    """Every picture searches all others: SOP, Cars196, CUB, iNaturalist, and VehicleID as metric learning reports it.

    Pictures that are alone in their class cannot be found by anybody: they stay in the gallery and are no queries.

    Args:
        vectors: May be memory-mapped, of any float type.
        ids: Unique, from 0; they decide ties.
        labels: Class of each picture, from 0.
        ks: At least one; of hit_rate@k, recall@k and rs_target@k.
        names: Of the pictures; ids as text where None.
        world: Ranks share the queries; every rank needs all vectors and returns the same section.

    Raises:
        DataError: see `checked_pictures`; or no class has two pictures.
    """
    pictures = checked_pictures("pictures", vectors, ids, labels, names)
    num_relevant = RelevantRows(pictures.ids, pictures.labels, pictures.ids, pictures.labels).counts
    queries = pictures.take(np.flatnonzero(num_relevant))
    if not len(queries):
        raise DataError("no class has two pictures, so no picture can be found by another.")
    values = _values_of(queries, pictures, ks, ties, world)
    facts = {"num_gallery": len(pictures), "num_alone": len(pictures) - len(queries)}
    return _section(queries.names, queries.labels, values, ks, ties, facts)


def query_gallery(
    query_vectors: Float[ndarray, "_ _"],
    query_ids: Int[ndarray, "_"],
    query_labels: Int[ndarray, "_"],
    gallery_vectors: Float[ndarray, "_ _"],
    gallery_ids: Int[ndarray, "_"],
    gallery_labels: Int[ndarray, "_"],
    *,
    ks: Sequence[int],
    ties: Ties = "index",
    names: Sequence[str] | None = None,
    world: World = World(),
) -> Section:
    """Given queries search a given gallery: In-shop.

    A query whose id is also in the gallery does not find itself. A query without any relevant picture has no value
    (NaN) and leaves the means; `num_unanswerable` counts them.

    Args:
        names: Of the queries.
        ks, ties, world: See `leave_one_out`.

    Raises:
        DataError: see `checked_pictures`; or lengths of vectors differ, or no query has a relevant picture.
    """
    queries = checked_pictures("queries", query_vectors, query_ids, query_labels, names)
    gallery = checked_pictures("gallery", gallery_vectors, gallery_ids, gallery_labels)
    if queries.dim != gallery.dim:
        raise DataError(f"queries have {queries.dim} dimensions, the gallery {gallery.dim}: one encoder makes both.")
    relevant = RelevantRows(gallery.ids, gallery.labels, queries.ids, queries.labels)
    num_unanswerable = int((relevant.counts == 0).sum())
    if num_unanswerable == len(queries):
        raise DataError(
            f"no query has a picture of its class in the gallery: classes {listed(np.unique(queries.labels))} "
            f"search among {listed(np.unique(gallery.labels))}."
        )
    values = _values_of(queries, gallery, ks, ties, world)
    facts = {
        "num_gallery": len(gallery),
        "num_unanswerable": num_unanswerable,
        "num_in_gallery_too": int((relevant.own >= 0).sum()),
    }
    return _section(queries.names, queries.labels, values, ks, ties, facts)


def random_gallery(
    vectors: Float[ndarray, "_ _"],
    ids: Int[ndarray, "_"],
    labels: Int[ndarray, "_"],
    *,
    ks: Sequence[int],
    num_seeds: int = 10,
    ties: Ties = "index",
    names: Sequence[str] | None = None,
    world: World = World(),
) -> Section:
    """One picture of each class at random is the gallery, all others are queries; again for each seed: VehicleID.

    The protocol of the data set's authors. Its numbers lie far below those of `leave_one_out` on the same vectors and
    are not comparable with them. A query is a (seed, picture) pair named "seed/name"; all seeds have equally many, so
    the mean over queries is the mean over seeds. The choice depends on seed and ids alone, not on the order of rows.

    Source: Liu, Tian, Yang, Pang, Huang 2016, "Deep Relative Distance Learning", CVPR, section 4 (one gallery image
    per vehicle); the repetitions are the practice of re-identification.

    Args:
        num_seeds: At least 1; seeds are 0, 1, ...
        vectors, ids, labels, ks, ties, names, world: See `leave_one_out`.

    Raises:
        DataError: see `checked_pictures`; or no class has two pictures.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    pictures = checked_pictures("pictures", vectors, ids, labels, names)
    num_classes = len(np.unique(pictures.labels))
    if num_classes == len(pictures):
        raise DataError("no class has two pictures, so no picture can be found by another.")
    parts, query_names, clusters = [], [], []
    for seed in range(num_seeds):
        chosen = _one_of_each_class(pictures, seed)
        queries = pictures.take(np.setdiff1d(np.arange(len(pictures)), chosen))
        parts.append(_values_of(queries, pictures.take(chosen), ks, ties, world))
        query_names += [f"{seed}/{name}" for name in queries.names]
        clusters.append(queries.labels)
    of_seeds = [{f"hit_rate@{k}": 100 * mean_of_known(part[f"hit_rate@{k}"]) for k in ks} for part in parts]
    per_seed = {name: [means[name] for means in of_seeds] for name in of_seeds[0]}
    facts = {
        "num_gallery": num_classes,
        "num_queries_per_seed": len(pictures) - num_classes,
        "num_seeds": num_seeds,
        "per_seed": per_seed,  # percent, as all that follows
        "deviation_over_seeds": {
            name: float(np.std(means, ddof=1)) if num_seeds > 1 else None for name, means in per_seed.items()
        },
    }
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _section(query_names, np.concatenate(clusters), values, ks, ties, facts)


def _one_of_each_class(pictures: Pictures, seed: int) -> Int64[ndarray, "classes"]:
    """Ascending places; of each class the picture whose id has the least hash."""
    order = np.lexsort((pictures.ids, counter_hash(seed, pictures.ids), pictures.labels))
    _, firsts = np.unique(pictures.labels[order], return_index=True)
    return np.sort(order[firsts])


def _values_of(
    queries: Pictures, gallery: Pictures, ks: Sequence[int], ties: Ties, world: World
) -> dict[str, Float64[ndarray, "queries"]]:
    """All metrics, and under "gap of ..." the optimistic minus the pessimistic value of those with a stated tie gap."""
    require_ks(ks)
    metrics = class_metrics(ks)
    with_gap = _metrics_with_gap(ks)
    relevant = RelevantRows(gallery.ids, gallery.labels, queries.ids, queries.labels)
    num_plain = len(metrics) + len(with_gap)
    values = np.zeros((len(queries), num_plain + len(RECALL_LEVELS)))
    longest = gallery.largest_norm()

    def measure(query: int, scores: ndarray) -> None:
        if relevant.own[query] >= 0:
            scores[relevant.own[query]] = -np.inf
        vector = queries.vector(query)
        [error] = float32_screening_error(vector[None], largest_norm=longest)
        settle_near_ties(scores, vector, gallery, relevant[query], error=error)
        placement = place_relevant(scores, gallery.ids, relevant[query])
        positions = placement.positions(ties)
        values[query, : len(metrics)] = [metric(positions) for metric in metrics.values()]
        values[query, num_plain:] = precision_at_recall(positions, RECALL_LEVELS)
        if placement.has_ties:
            best, worst = placement.positions("optimistic"), placement.positions("pessimistic")
            values[query, len(metrics) : num_plain] = [metrics[name](best) - metrics[name](worst) for name in with_gap]

    num_threads = world.share_of_cores(num_cores())
    total = -(-len(queries) // world.size)
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="positions") as pool,
        Progress(total, description="ranking", unit="pictures", is_shown=world.is_first) as progress,
    ):
        for block, scores in score_blocks(queries, gallery, world):
            list(pool.map(measure, block, scores))
            progress.advance(len(block))
    if world.size > 1:  # each row has one rank that filled it
        summed = torch.from_numpy(values).to(available_device())
        sum_over_ranks([summed], world)
        values = summed.cpu().numpy()
    columns = [*metrics, *(f"gap of {name}" for name in with_gap), *_RECALL_COLUMNS]
    return dict(zip(columns, np.ascontiguousarray(values.T), strict=True))


def _metrics_with_gap(ks: Sequence[int]) -> list[str]:
    return ["map", f"hit_rate@{ks[0]}"]


def _section(
    names: Sequence[str],
    labels: Int64[ndarray, "queries"],
    values: dict[str, Float64[ndarray, "queries"]],
    ks: Sequence[int],
    ties: Ties,
    facts: dict[str, Any],
) -> Section:
    with_gap = _metrics_with_gap(ks)
    gaps = {name: values[f"gap of {name}"] for name in with_gap}
    per_query = {name: values[name] for name in class_metrics(ks)}
    is_known = ~np.isnan(per_query["map"])
    curve = [100 * mean_of_known(values[name]) for name in _RECALL_COLUMNS]
    facts |= {
        "precision_at_recall": curve,
        "ties": ties,
        "tie_gap": {name: 100 * float(gap[is_known].mean()) for name, gap in gaps.items()},
    }
    return Section(tuple(names), labels, per_query, {}, facts)
