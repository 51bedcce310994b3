"""Memory, build time and latency of an index type, predicted from sizes and a machine's rates.

What depends on the data (how many codes a search scans, how many distances a graph search takes) comes from trials;
the rest is counting. Resident memory counts what a search touches at random or in full; the memory-mapped store of an
index with its own codes is touched at a few rows per query and is not counted.
"""

import math
from dataclasses import dataclass

from indexing.building.training import KMEANS_ITERATIONS, POINTS_PER_PARTITION
from indexing.index_types import IndexType
from indexing.planning.calibration import MachineRates
from indexing.settings import IndexSettings

_ID_BYTES = 8
# Beside its links, per vector of a graph: its level and the place of its links.
_GRAPH_OVERHEAD_BYTES = 16
# Distances that adding one vector to a graph of 100,000 takes, per link; grows with the logarithm of the size.
_DISTANCES_PER_ADDED_LINK = 54
# Relative to gathering from a list of places: links are read, too, and one step must end before the next is known.
_COST_OF_A_GRAPH_STEP = 2.0
_ENCODING_PASSES = 30  # encoding a vector costs as many scans of it


@dataclass(frozen=True, slots=True)
class SearchWork:
    """What one query does at one effort, on average; counted in a trial, scaled to the whole collection."""

    scanned: float  # codes compared in sequence
    gathered: float = 0.0  # codes of a graph at random places
    rescored: float = 0.0  # candidates whose vectors are read from the store and scored exactly


def memory_bytes(index_type: IndexType, num_vectors: int, dim: int) -> int:
    """That searches keep occupied."""
    ids = num_vectors * _ID_BYTES
    if index_type.family == "flat":
        return ids + num_vectors * 4 * dim
    codes = num_vectors * index_type.code_bytes(dim)
    if index_type.family == "ivf":
        return ids + codes + index_type.num_partitions * 4 * dim
    return ids + codes + num_vectors * (8 * index_type.num_links + _GRAPH_OVERHEAD_BYTES)


def build_seconds(
    index_type: IndexType, num_vectors: int, dim: int, rates: MachineRates, settings: IndexSettings
) -> float:
    """From a finished store to a measured index."""
    truth = 2 * settings.num_measured_queries * num_vectors * dim / rates.flops
    if index_type.family == "flat":
        return 0.0
    if index_type.family == "hnsw":
        distances = _DISTANCES_PER_ADDED_LINK * index_type.num_links * _relative_depth(num_vectors)
        # One thread links: what several of them build differs from time to time.
        return truth + num_vectors * distances * _COST_OF_A_GRAPH_STEP * rates.gather_seconds
    partitions = index_type.num_partitions
    trained = min(num_vectors, POINTS_PER_PARTITION * partitions)
    training = 2 * trained * partitions * dim * KMEANS_ITERATIONS / rates.flops
    assignment = 2 * num_vectors * partitions * dim / rates.flops
    encoding = num_vectors * _ENCODING_PASSES * rates.scan_seconds["Flat"]
    return truth + training + assignment + encoding


def query_seconds(index_type: IndexType, work: SearchWork, dim: int, rates: MachineRates, *, in_batches: bool) -> float:
    """Of one query: alone, or as its share of a large batch."""
    call = 0.0 if in_batches else rates.call_seconds
    if index_type.family == "flat":
        return call + work.scanned * (rates.exact_batch_seconds if in_batches else rates.exact_seconds)
    # Centroids are compared by a matrix product where there are many queries, one by one where there is one.
    centroid = 2 * dim / rates.flops if in_batches else rates.scan_seconds["Flat"]
    coarse = index_type.num_partitions * centroid if index_type.family == "ivf" else 0.0
    seconds = call + coarse + work.scanned * rates.scan_seconds[index_type.codec]
    return (
        seconds + work.gathered * _COST_OF_A_GRAPH_STEP * rates.gather_seconds + work.rescored * rates.rescore_seconds
    )


def _relative_depth(num_vectors: int) -> float:
    return max(0.3, math.log(max(num_vectors, 2)) / math.log(100_000))
