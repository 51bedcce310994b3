"""Approximate search among some of the vectors: how hard to look, and where."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from indexing.index_types import IndexType
from indexing.searching.exact import COST_OF_A_GATHERED_ROW, selected_rows
from indexing.searching.screening import ROWS_OF_CALIBRATION, calibrated_costs
from indexing.vector_store import VectorStore
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import load_faiss
from lookalike.products import product
from lookalike.records import Effort, SearchHits

# A bitmap is taken where ids are dense enough: 8 bytes per vector at most.
_MOST_BITS_PER_VECTOR = 64
# An exact answer is worth this many times the time of an approximate one.
_WORTH_OF_EXACTNESS = 5.0
# Of an HNSW graph: vectors compared for each candidate kept.
_COMPARED_PER_BREADTH = 16
# One survivor in eight is drawn, but not fewer and not more than these.
_SMALLEST_SAMPLE, _LARGEST_SAMPLE = 1024, 4096
# So many of the sample's best are waited for, beside those expected among the k best. Measured on clustered vectors
# with filters that go with the clusters, or leave what is far from the query: with 4, recall fell to 0.94 of the level.
_AWAITED = 10


@dataclass(frozen=True, eq=False)
class Survivors:
    """The vectors of a store that a search may find."""

    store: VectorStore
    may_be_found: Bool[ndarray, "vectors"]
    count: int

    @classmethod
    def of(cls, among: IdSelection, store: VectorStore) -> "Survivors":
        may_be_found = selected_rows(store, among)
        return cls(store, may_be_found, int(np.count_nonzero(may_be_found)))

    @cached_property
    def selector(self) -> Any:
        """For FAISS; holds for the ids of the store."""
        faiss = load_faiss()
        ids = np.asarray(self.store.ids)
        if ids[0] >= 0 and ids[-1] < _MOST_BITS_PER_VECTOR * len(ids):
            bits = np.zeros(int(ids[-1]) + 1, bool)
            bits[ids[self.may_be_found]] = True
            return faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
        if 2 * self.count > len(ids):
            return faiss.IDSelectorNot(faiss.IDSelectorBatch(ids[~self.may_be_found]))
        return faiss.IDSelectorBatch(ids[self.may_be_found])

    @cached_property
    def _sample(self) -> tuple[Int64[ndarray, "sample"], Float32[ndarray, "sample dim"]]:
        """Rows and vectors of some survivors, drawn at random but always the same."""
        rows = np.flatnonzero(self.may_be_found)
        size = min(len(rows), max(_SMALLEST_SAMPLE, min(_LARGEST_SAMPLE, len(rows) // 8)))
        rows = np.sort(np.random.default_rng(0).choice(rows, size, replace=False))
        return rows, np.asarray(self.store.vectors[rows], np.float32)

    def best_of_sample(self, queries: Float32[ndarray, "queries dim"], *, k: int) -> Int64[ndarray, "queries awaited"]:
        """Rows of the survivors in the sample that are closest to each query, in no order."""
        rows, vectors = self._sample
        count = min(_AWAITED + k * len(rows) // self.count, len(rows))
        return rows[np.argpartition(-product(queries, vectors.T), count - 1, axis=1)[:, :count]]

    def are_missed(self, queries: Float32[ndarray, "queries dim"], hits: SearchHits) -> Bool[ndarray, "queries"]:
        """For each query whether a survivor of the sample is better than the last hit, but not among the hits.

        Where a filter leaves pictures far from the query only, an approximate search may find too few or the wrong
        ones; the more it misses, the surer the sample shows it. Fewer hits than asked for are too few, since there are
        more survivors than that.
        """
        rows, vectors = self._sample
        margin = 1e-4  # of rounding
        missed = hits.ids[:, -1] < 0
        full = np.flatnonzero(~missed)
        scores = product(queries[full], vectors.T)
        query_rows, columns = np.nonzero(scores > hits.scores[full, -1:] + margin)
        # Pairs as numbers: compared one with all hits, they would take k times the memory.
        first_of_query = np.arange(len(full)) * self.store.num_vectors
        hit_rows = self.store.rows_of(hits.ids[full].ravel()).reshape(len(full), -1)
        is_hit = np.isin(first_of_query[query_rows] + rows[columns], first_of_query[:, None] + hit_rows)
        missed[full[query_rows[~is_hit]]] = True
        return missed


def exact_is_cheaper(store: VectorStore, num_survivors: int, *, num_queries: int, rows_per_query: float) -> bool:
    """Whether to compare all survivors, by the times that products take on this machine.

    Args:
        rows_per_query: Vectors that an approximate search would compare instead.
    """
    costs = calibrated_costs(store.dim)
    seconds_per_row = costs["vector"][1] / ROWS_OF_CALIBRATION
    read = min(COST_OF_A_GATHERED_ROW * num_survivors, store.num_vectors) * seconds_per_row
    compared = min(fixed + num_queries * each for fixed, each in costs.values())
    exact = read + num_survivors / ROWS_OF_CALIBRATION * compared
    return exact <= _WORTH_OF_EXACTNESS * num_queries * rows_per_query * seconds_per_row


def rows_compared(index_type: IndexType, effort: Effort, num_vectors: int) -> float:
    """How many vectors one query is compared with at `effort`, about."""
    if index_type.family == "ivf":
        share = min(1.0, (effort.num_probes or 1) / index_type.num_partitions)
        return index_type.num_partitions + share * num_vectors
    return float(COST_OF_A_GATHERED_ROW * min(_COMPARED_PER_BREADTH * (effort.breadth or 1), num_vectors))


@dataclass(frozen=True, eq=False)
class Probes:
    """Per query, the partitions to look into, best first; -1 after the last one."""

    partitions: Int64[ndarray, "queries probes"]
    products: Float32[ndarray, "queries probes"]  # of the query and the partition's centroid
    rows_per_query: float  # vectors in these partitions, and centroids, on average


class PartitionMap:
    """Which partition of an IVF index each vector lies in; probes are chosen by where survivors are."""

    def __init__(self, index: Any, store: VectorStore) -> None:
        self._index, self._store = index, store

    @cached_property
    def _partition_of_row(self) -> ndarray:
        """Int32 [vectors]; read from the partitions at the first filtered search."""
        faiss, lists = load_faiss(), self._index.invlists
        partition_of = np.zeros(self._store.num_vectors, np.int32)
        for number in range(self._index.nlist):
            if size := lists.list_size(number):
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
                partition_of[self._store.rows_of(ids)] = number
        return partition_of

    @cached_property
    def _sizes(self) -> Int64[ndarray, "partitions"]:
        return np.bincount(self._partition_of_row, minlength=self._index.nlist)

    @cached_property
    def _centroids(self) -> Float32[ndarray, "partitions dim"]:
        centroids: ndarray = self._index.quantizer.reconstruct_n(0, self._index.nlist)
        return centroids

    def probes(
        self, queries: Float32[ndarray, "queries dim"], survivors: Survivors, *, num_probes: int, k: int
    ) -> Probes:
        """The nearest partitions that hold any survivor.

        As many as it takes to see as many survivors as `num_probes` partitions hold vectors, and to have passed the
        best survivors of a sample: where a filter goes with the clusters, the next of kin lie far apart.
        """
        occupancy = np.bincount(self._partition_of_row[survivors.may_be_found], minlength=self._index.nlist)
        closeness = product(queries, self._centroids.T)
        order = np.argsort(-closeness, axis=1)
        wanted = self._sizes[order[:, :num_probes]].sum(axis=1)
        seen_before = np.cumsum(occupancy[order], axis=1) - occupancy[order]
        is_probed = seen_before < wanted[:, None]
        awaited = self._partition_of_row[survivors.best_of_sample(queries, k=k)]
        place_of = np.argsort(order, axis=1)
        furthest = np.take_along_axis(place_of, awaited, axis=1).max(axis=1)
        is_probed |= np.arange(order.shape[1]) <= furthest[:, None]
        is_probed &= occupancy[order] > 0
        width = int(is_probed.sum(axis=1).max())
        # The probed ones to the front, in their order.
        front = np.argsort(~is_probed, axis=1, kind="stable")[:, :width]
        partitions = np.take_along_axis(order, front, axis=1)
        products = np.take_along_axis(closeness, partitions, axis=1)
        is_probe = np.take_along_axis(is_probed, front, axis=1)
        return Probes(
            np.where(is_probe, partitions, -1),
            np.where(is_probe, products, np.float32(0)),
            rows_per_query=self._index.nlist + float((self._sizes[order] * is_probed).sum(axis=1).mean()),
        )

    def search(
        self,
        queries: Float32[ndarray, "queries dim"],
        probes: Probes,
        survivors: Survivors,
        *,
        depth: int,
    ) -> Int64[ndarray, "queries depth"]:
        """Ids of the best survivors in the probed partitions by their codes; -1 where there are fewer."""
        faiss = load_faiss()
        # FAISS's own wrapper takes no parameters. All arrays have names here, so that they outlive the call.
        partitions, products = (np.ascontiguousarray(part) for part in (probes.partitions, probes.products))
        scores = np.empty((len(queries), depth), np.float32)
        ids = np.empty((len(queries), depth), np.int64)
        parameters = faiss.SearchParametersIVF(nprobe=partitions.shape[1], sel=survivors.selector)
        self._index.search_preassigned_c(
            len(queries),
            faiss.swig_ptr(queries),
            depth,
            faiss.swig_ptr(partitions),
            faiss.swig_ptr(products),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(ids),
            False,
            parameters,
        )
        return ids
