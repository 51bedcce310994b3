"""Known vectors must be found under their own ids: an index with wrong ones answers fluently and wrongly."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.building.training import sample_rows
from indexing.index_types import IndexType
from indexing.searching.searcher import Searcher
from indexing.vector_store import VectorStore
from lookalike.errors import DataError
from lookalike.native_libraries import load_faiss
from lookalike.records import Effort, SearchParameters

NUM_CANARIES = 8
_ROWS_PER_PART = 32
_DEPTH = 10
# A compressed index orders candidates coarsely; among so many per hit, the vector itself is sure to be scored exactly.
_CANDIDATES_PER_HIT = 100
_LARGE_BREADTH = 2048
_ROUNDING = 1e-4  # of an inner product of unit vectors, stored in float16 at worst


def require_rows_under_their_ids(
    index: Any,
    vectors: Float32[ndarray, "rows dim"],
    ids: Int64[ndarray, "rows"],
    assigned: Int64[ndarray, "rows"],
) -> None:
    """Some of the vectors just added to an IVF index: a search must return their ids, which must hold their codes.

    Raises:
        DataError: an id is missing, or belongs to another vector.
    """
    faiss = load_faiss()
    for row in sample_rows(len(ids), _ROWS_PER_PART, seed=len(ids)).tolist():
        vector, partition = vectors[row : row + 1], assigned[row : row + 1]
        size = index.invlists.list_size(int(partition[0]))
        _, found = index.search(vector, size, params=faiss.SearchParametersIVF(nprobe=1))
        places = np.flatnonzero(faiss.rev_swig_ptr(index.invlists.get_ids(int(partition[0])), size) == ids[row])
        if ids[row] not in found[0] or len(places) != 1:
            raise DataError(f"faiss does not find the vector with id {ids[row]} that was just added; nothing is built.")
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(int(partition[0])), size * index.code_size)
        expected = np.empty(index.code_size, np.uint8)
        index.encode_vectors(1, faiss.swig_ptr(vector), faiss.swig_ptr(partition), faiss.swig_ptr(expected))
        if not np.array_equal(codes.reshape(size, -1)[places[0]], expected):
            raise DataError(f"faiss holds another vector under id {ids[row]} than was just added; nothing is built.")


def canary_ids(store: VectorStore, *, seed: int) -> Int64[ndarray, "canaries"]:
    """Ids, ascending, whose vectors are looked up whenever an index is checked."""
    return np.asarray(store.ids[sample_rows(store.num_vectors, NUM_CANARIES, seed=seed)])


def require_ids_found(searcher: Searcher, index_type: IndexType, store: VectorStore, ids: Int64[ndarray, "n"]) -> None:
    """Exact and approximate search must find the vectors of `ids` under these ids.

    Raises:
        DataError: one of them does not.
    """
    if not np.array_equal(searcher.vectors_of(ids), store.vectors_of(ids)):
        raise DataError("the index returns other vectors for its canary ids than it was built from.")
    thorough = Effort(
        num_probes=index_type.num_partitions if index_type.family == "ivf" else None,
        breadth=_LARGE_BREADTH if index_type.family == "hnsw" else None,
        candidates_per_hit=_CANDIDATES_PER_HIT,
    )
    vectors = store.vectors_of(ids)
    own_scores = np.einsum("nd,nd->n", vectors, vectors)
    for way, parameters in (
        ("exact", SearchParameters(k=_DEPTH, exact=True)),
        ("approximate", SearchParameters(k=_DEPTH, effort=thorough)),
    ):
        hits = searcher.search(vectors, parameters)
        for identifier, own_score, found, scores in zip(ids, own_scores, hits.ids, hits.scores, strict=True):
            # More copies than places: then all that is found scores as high.
            is_crowded_out = bool((scores >= own_score - _ROUNDING).all())
            if identifier not in found and not is_crowded_out:
                raise DataError(f"{way} search does not find the vector of id {identifier} under this id.")
