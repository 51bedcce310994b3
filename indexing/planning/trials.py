"""Small experiments on the collection itself: how far each index type must search to find the exact nearest.

Some vectors are held out as queries; their exact neighbours are found in the whole collection. A trial index then holds
all those neighbourhoods and a random sample of the rest, as much as fits in `_LARGEST_TRIAL_BYTES`. It has as many
partitions as the finished index will have, so the share of neighbours in the p nearest of them is that of the whole
collection; the codecs meet all close competitors of the true neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from indexing.building.training import POINTS_PER_PARTITION, train_centroids
from indexing.index_types import IndexType, create_untrained
from indexing.planning.calibration import MachineRates
from indexing.planning.cost_model import SearchWork, query_seconds
from indexing.planning.held_out import held_out_rows
from indexing.planning.measuring import MOST_CANDIDATES_PER_HIT, candidate_depth, least_reaching, recalls_by_depth
from indexing.searching.exact import ExactSearcher
from indexing.settings import IndexSettings
from indexing.vector_store import VectorStore
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import load_faiss
from lookalike.products import product
from lookalike.records import Effort, SearchParameters

_LARGEST_TRIAL_BYTES = 128 << 20
_MOST_TRIAL_QUERIES = 400
_CODEC_POINTS = 16_384
_LARGEST_TRIAL_GRAPH = 16_384
_WIDEST_BREADTH = 4096
# Tried at these multiples of the fewest partitions that hold enough neighbours.
_PROBE_FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one index type needs for the recall that was asked for, or comes to at most."""

    effort: Effort
    recall: float
    work: SearchWork  # of one query, scaled to the whole collection


@dataclass(frozen=True, eq=False)
class TrialSet:
    """Held-out queries, their exact neighbours, and the vectors that trial indexes are made of."""

    queries: Float32[ndarray, "queries dim"]
    vectors: Float32[ndarray, "rows dim"]
    truth: Int64[ndarray, "queries depth"]  # rows of `vectors`, best first
    is_random: Bool[ndarray, "rows"]  # the sample that stands for the whole collection
    num_vectors: int  # in the whole collection
    at: int
    seed: int

    @cached_property
    def wanted(self) -> Int64[ndarray, "queries at"]:
        """The neighbours that `recall` speaks of."""
        return self.truth[:, : self.at]


def draw_trial_set(store: VectorStore, settings: IndexSettings) -> TrialSet:
    """Costs an exact search of a few hundred queries; memory stays within some 200 MiB.

    Raises:
        ValueError: the store holds fewer than 20 vectors.
    """
    if store.num_vectors < 20:
        raise ValueError(f"a trial needs at least 20 vectors, got {store.num_vectors}")
    held_out = held_out_rows(store.num_vectors, seed=settings.seed)
    num_queries = min(settings.num_measured_queries, _MOST_TRIAL_QUERIES, len(held_out))
    query_rows = np.sort(held_out[:num_queries])
    others = np.setdiff1d(np.arange(store.num_vectors), query_rows)
    most_rows = _LARGEST_TRIAL_BYTES // (4 * store.dim)
    at = min(settings.at, len(others))
    # As many neighbours as candidates will be taken, but no more than half of the trial.
    depth = min(max(at, min(MOST_CANDIDATES_PER_HIT * at, most_rows // (2 * num_queries))), len(others))
    queries = np.asarray(store.vectors[query_rows], np.float32)
    parameters = SearchParameters(k=depth, among=IdSelection.all_but(store.ids[query_rows]))
    truth = store.rows_of(ExactSearcher(store).search(queries, parameters).ids.ravel()).reshape(num_queries, depth)
    most_sampled = most_rows - (np.unique(truth).size if most_rows < len(others) else 0)
    sample = np.random.default_rng(settings.seed).permutation(others)[:most_sampled]
    rows = np.union1d(sample, truth)
    return TrialSet(
        queries=queries,
        vectors=np.asarray(store.vectors[rows], np.float32),
        truth=np.searchsorted(rows, truth),
        is_random=np.isin(rows, sample),
        num_vectors=store.num_vectors,
        at=at,
        seed=settings.seed,
    )


class Partitioning:
    """One k-means, shared by the trials of all codecs."""

    def __init__(self, trial_set: TrialSet, num_partitions: int) -> None:
        self._set, self.num_partitions = trial_set, num_partitions
        sample = trial_set.vectors[trial_set.is_random]
        self.centroids = train_centroids(
            _spread(sample, POINTS_PER_PARTITION * num_partitions), num_partitions, seed=trial_set.seed
        )
        self._partition_of = nearest_centroids(trial_set.vectors, self.centroids)
        scores = product(trial_set.queries, self.centroids.T)
        sizes = np.bincount(self._partition_of[trial_set.is_random], minlength=num_partitions)
        by_closeness = np.argsort(-scores, axis=1, kind="stable")
        scale = trial_set.num_vectors / len(sample)
        self.scanned = scale * np.cumsum(sizes[by_closeness], axis=1).mean(axis=0)
        """Codes in the p + 1 partitions closest to a query, on average."""
        place = np.argsort(by_closeness, axis=1)
        places = np.take_along_axis(place, self._partition_of[trial_set.wanted], axis=1)
        counts = np.bincount(places.ravel(), minlength=num_partitions)
        self.coverage = np.cumsum(counts) / places.size
        """Share of the exact neighbours that lie in the p + 1 partitions closest to their query."""

    def index_of(self, index_type: IndexType) -> Any:
        """A FAISS index over the trial's vectors; ids are rows."""
        faiss = load_faiss()
        index = create_untrained(index_type, self._set.vectors.shape[1], seed=self._set.seed)
        index.quantizer.train(self.centroids)
        index.quantizer.add(self.centroids)
        index.train(_spread(self._set.vectors, _CODEC_POINTS))
        # Kept by name: the pointers must outlive the call.
        vectors, partitions = self._set.vectors, self._partition_of
        ids = np.arange(len(vectors))
        index.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(partitions))
        index.ntotal = len(vectors)
        return index

    def trial(self, index_type: IndexType, *, recall: float, rates: MachineRates, in_batches: bool) -> Trial:
        """The cheapest effort that reaches `recall`, or the best one."""
        if index_type.codec == "Flat":
            # Scores in lists are exact, so a neighbour is found if and only if its partition is visited.
            num_probes = min(int(np.searchsorted(self.coverage, recall)) + 1, self.num_partitions)
            return self._trial_at(Effort(num_probes=num_probes), float(self.coverage[num_probes - 1]))
        index = self.index_of(index_type)
        reached, best = [], None
        for num_probes in self._probes(recall):
            for trial in self._trials_at(index, num_probes):
                best = trial if best is None or trial.recall > best.recall else best
                if trial.recall >= recall:
                    reached.append(trial)
                    break
        assert best is not None
        dim = self._set.vectors.shape[1]
        return min(
            reached or [best],
            key=lambda trial: query_seconds(index_type, trial.work, dim, rates, in_batches=in_batches),
        )

    def _probes(self, recall: float) -> list[int]:
        fewest = min(int(np.searchsorted(self.coverage, recall)) + 1, self.num_partitions)
        return sorted({min(round(factor * fewest), self.num_partitions) for factor in _PROBE_FACTORS})

    def _trials_at(self, index: Any, num_probes: int) -> Iterator[Trial]:
        at, most = self._set.at, max(1, self._set.truth.shape[1] // self._set.at)
        efforts = [Effort(num_probes=num_probes, candidates_per_hit=number + 1) for number in range(most)]
        depths = [min(candidate_depth(at, effort), len(self._set.vectors)) for effort in efforts]
        parameters = load_faiss().SearchParametersIVF(nprobe=num_probes)
        _, found = index.search(self._set.queries, depths[-1], params=parameters)
        recalls = recalls_by_depth(found, self._set.wanted)
        for effort, depth in zip(efforts, depths, strict=True):
            yield self._trial_at(effort, float(recalls[depth - 1]))

    def _trial_at(self, effort: Effort, recall: float) -> Trial:
        assert effort.num_probes is not None
        rescored = float(candidate_depth(self._set.at, effort))
        work = SearchWork(scanned=float(self.scanned[effort.num_probes - 1]), rescored=rescored)
        return Trial(effort, recall, work)


def graph_trial(trial_set: TrialSet, index_type: IndexType, *, recall: float) -> Trial:
    """The least breadth that reaches `recall` in a graph of a random sample, or the widest one.

    A graph of everything is what is costly about graphs. Steps towards a neighbour grow with the logarithm of the
    size; so do distances and breadth here.
    """
    faiss = load_faiss()
    sample = _spread(trial_set.vectors[trial_set.is_random], _LARGEST_TRIAL_GRAPH)
    index = create_untrained(index_type, sample.shape[1], seed=trial_set.seed)
    index.train(sample)
    index.add(sample)
    width = min(candidate_depth(trial_set.at, Effort()), len(sample))
    nearest = ExactSearcher(VectorStore(sample, np.arange(len(sample))))
    wanted = nearest.search(trial_set.queries, SearchParameters(k=trial_set.at)).ids
    growth = max(1.0, np.log(trial_set.num_vectors) / np.log(len(sample)))
    known: dict[int, Trial] = {}

    def recall_of(breadth: int) -> float:
        if breadth not in known:
            faiss.cvar.hnsw_stats.reset()
            _, found = index.search(trial_set.queries, width, params=faiss.SearchParametersHNSW(efSearch=breadth))
            distances = faiss.cvar.hnsw_stats.ndis / len(trial_set.queries)
            work = SearchWork(scanned=0.0, gathered=distances * growth**2, rescored=float(width))
            reached = float(recalls_by_depth(found, wanted)[-1])
            known[breadth] = Trial(Effort(breadth=round(breadth * growth)), reached, work)
        return known[breadth].recall

    return known[least_reaching(recall, recall_of, least=width, most=max(width, _WIDEST_BREADTH), resolution=16)]


def nearest_centroids(
    vectors: Float32[ndarray, "n dim"], centroids: Float32[ndarray, "partitions dim"]
) -> Int64[ndarray, "n"]:
    """The partition of each vector."""
    block = max(1, (32 << 20) // (4 * len(centroids)))
    starts = range(0, len(vectors), block)
    return np.concatenate([product(vectors[start : start + block], centroids.T).argmax(axis=1) for start in starts])


def _spread(vectors: Float32[ndarray, "n dim"], most: int) -> Float32[ndarray, "some dim"]:
    """At most so many, evenly spread: rows are in the order of ids, which may follow classes."""
    return np.ascontiguousarray(vectors[:: -(-len(vectors) // most)])
