"""The pictures behind the numbers of shards, for reports."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from evaluation.galleries import (
    NUM_SHOWN,
    Illustrations,
    Kind,
    ShardShelf,
    Shelf,
    confusing_pictures,
    gallery_of,
    listed_hits,
    worst_queries,
)
from evaluation.reporting.values import ShownPicture
from evaluation.result import Section
from evaluation.revisited.ground_truth import GroundTruth, Setup
from lookalike.exact_search import exact_search
from lookalike.records import SearchHits

_DEPTH = 100
_CLASSES_MAIN_METRIC = "map@r"


@runtime_checkable
class LabelledPictures(Protocol):
    """Pictures with vectors and classes, by sample id."""

    @property
    def ids(self) -> Int64[ndarray, "pictures"]: ...

    @property
    def vectors(self) -> Float[ndarray, "pictures dim"]: ...

    @property
    def labels(self) -> Int64[ndarray, "pictures"]: ...

    @property
    def names(self) -> list[str]: ...


def class_pictures(
    section_name: str,
    section: Section,
    shard_set: ShardSet,
    queries: LabelledPictures,
    gallery: LabelledPictures,
    *,
    choose: Callable[[Float64[ndarray, "_"]], Int64[ndarray, "_"]] = worst_queries,
    nearest: Callable[[Int64[ndarray, "_"], int], SearchHits] | None = None,
    rivals: Mapping[str, LabelledPictures] = {},
) -> Illustrations:
    """Queries of pictures with classes and the start of their rankings.

    Args:
        choose: Places of the queries to show, by their MAP@R.
        nearest: Ranks queries at some places, each without itself, as they were judged; brute force where None.
        rivals: The same gallery under other vectors, whose rankings are shown below.
    """
    metric = _CLASSES_MAIN_METRIC
    values = section.per_query[metric] if metric in section.per_query else section.bounds[metric][:, 0]
    place_of_name = {name: place for place, name in enumerate(queries.names)}
    # Queries of several seeds are called seed/name.
    chosen = [place_of_name.get(section.query_names[i], -1) for i in choose(values)]
    places = np.array([place for place in chosen if place >= 0], np.int64)
    if not len(places):
        return Illustrations()
    vectors = np.ascontiguousarray(queries.vectors[places], np.float32)
    if nearest:
        hits = nearest(places, _DEPTH)
    else:
        hits = exact_search(vectors, gallery.vectors, gallery.ids, k=_DEPTH, excluded_ids=queries.ids[places])
    hits_of_rivals = {
        name: exact_search(
            np.ascontiguousarray(rival.vectors[places], np.float32),
            rival.vectors,
            rival.ids,
            k=NUM_SHOWN,
            excluded_ids=queries.ids[places],
        )
        for name, rival in rivals.items()
    }
    label_of = dict(zip(gallery.ids.tolist(), gallery.labels.tolist(), strict=True))
    shelf = ShardShelf(shard_set)

    def kind_of(query: int, id: int) -> Kind:
        return "relevant" if label_of[id] == int(queries.labels[places[query]]) else "unrelated"

    galleries = []
    for query, place in enumerate(places.tolist()):
        own = int(queries.ids[place])
        same_class = gallery.ids[gallery.labels == queries.labels[place]]
        galleries.append(
            gallery_of(
                section_name,
                ShownPicture(queries.names[place], "query", shelf.jpeg(own)),
                listed_hits(hits, query),
                partial(kind_of, query),
                shelf,
                relevant=same_class[same_class != own],
                rivals={name: listed_hits(own_hits, query) for name, own_hits in hits_of_rivals.items()},
            )
        )
    return Illustrations(galleries, confusing_pictures(hits, kind_of, shelf))


def landmark_pictures(
    sections: Mapping[str, Section], truth: GroundTruth, hits: SearchHits, *, gallery_shelf: Shelf, query_shelf: Shelf
) -> Illustrations:
    """Failures of Oxford and Paris in the hard setup, and what stands in front for the most queries.

    Args:
        hits: Of all queries, junk included; rows of the database, then of the distractors.
    """
    setup: Setup = "hard"
    section = sections[setup]
    values = section.per_query["map"] if "map" in section.per_query else section.bounds["map"][:, 0]

    def kind_of(query: int, row: int) -> Kind:
        labels = truth.labels[query]
        rows, is_relevant = labels.labelled(), labels.is_relevant(setup)
        found = np.flatnonzero(rows == row)
        if not len(found):
            return "unrelated"
        return "relevant" if is_relevant[found[0]] else "junk"

    galleries = []
    for query in worst_queries(values).tolist():
        labels = truth.labels[query]
        galleries.append(
            gallery_of(
                setup,
                ShownPicture(truth.query_names[query], "query", query_shelf.jpeg(query)),
                listed_hits(hits, query),
                partial(kind_of, query),
                gallery_shelf,
                relevant=labels.labelled()[labels.is_relevant(setup)],
            )
        )
    return Illustrations(galleries, confusing_pictures(hits, kind_of, gallery_shelf))
