"""FAISS indexes with explicit 64-bit ids: creation by type, search without mutation, vectors by id."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.settings import IndexSettings
from lookalike.errors import ArtifactError, SettingsError
from lookalike.exact_search import merge_hits, require_searchable
from lookalike.native_libraries import load_faiss
from lookalike.records import SearchHits, SearchParameters

_IVF_TYPE = re.compile(r"IVF([2-9]|[1-9]\d+),Flat")
# k-means wants at least this many vectors per partition before faiss warns (its min_points_per_centroid).
_FEWEST_PER_PARTITION = 39
_MOST_PER_PARTITION = 256
# faiss cuts ties at the k-th place in its own order, so a few more are fetched and ordered by id.
_EXTRA_FOR_TIES = 16


def choose_type(num_vectors: int, settings: IndexSettings) -> str:
    """The index type for a collection: as asked, or by size (partitions = 4 sqrt(n), rounded down to a power of 2)."""
    if settings.type != "auto":
        if settings.type != "Flat" and not _IVF_TYPE.fullmatch(settings.type):
            raise SettingsError(f"type: {settings.type!r} is not one of auto, Flat, IVF<partitions>,Flat.")
        return settings.type
    if num_vectors <= settings.largest_flat:
        return "Flat"
    return f"IVF{2 ** int(np.log2(4 * np.sqrt(num_vectors)))},Flat"


def create_faiss_index(
    index_type: str, vectors: Float32[ndarray, "vectors dim"], ids: Int64[ndarray, "vectors"], *, seed: int
) -> Any:
    """Trains where the type needs it, adds all vectors under their ids, and returns the faiss index.

    Raises:
        SettingsError: too few vectors for the number of partitions.
    """
    faiss = load_faiss()
    dim = vectors.shape[1]
    if index_type == "Flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    else:
        num_partitions = num_partitions_of(index_type)
        if len(vectors) < num_partitions * _FEWEST_PER_PARTITION:
            raise SettingsError(
                f"type: {index_type} needs at least {num_partitions * _FEWEST_PER_PARTITION} vectors, "
                f"found {len(vectors)}. Ask for fewer partitions, or for Flat."
            )
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_partitions, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        sample_size = min(len(vectors), num_partitions * _MOST_PER_PARTITION)
        sample = np.random.default_rng(seed).choice(len(vectors), sample_size, replace=False)
        index.train(vectors[np.sort(sample)])
    index.add_with_ids(vectors, ids)
    return index


def num_partitions_of(index_type: str) -> int:
    """1 for Flat: one partition that every query visits."""
    match = _IVF_TYPE.fullmatch(index_type)
    return int(match.group(1)) if match else 1


class FaissSearcher:
    """Read-only search over one faiss index. Parameters travel with each call; the index is never changed."""

    def __init__(self, index: Any, *, index_type: str, default_num_probes: int) -> None:
        self._faiss = load_faiss()
        self._index = index
        self._num_partitions = num_partitions_of(index_type)
        self._default_num_probes = default_num_probes
        self.num_vectors = int(index.ntotal)
        self.dim = int(index.d)
        if self._num_partitions > 1:
            # Only now, before anybody searches: lets vectors be read back by id.
            index.set_direct_map_type(self._faiss.DirectMap.Hashtable)

    @classmethod
    def read(cls, path: Path, *, index_type: str, default_num_probes: int) -> "FaissSearcher":
        """Raises ArtifactError where the file is missing or damaged."""
        faiss = load_faiss()
        if not path.exists():
            raise ArtifactError(f"{path} is missing. Build the index again.")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be read by faiss. Build the index again.") from error
        return cls(index, index_type=index_type, default_num_probes=default_num_probes)

    def search(self, queries: Float32[ndarray, "queries query_dim"], parameters: SearchParameters) -> SearchHits:
        """The best hits under `parameters`; equal scores are ordered by id.

        Where more than 16 vectors tie with the k-th, faiss decides which of them are among the k.

        Raises:
            ValueError: wrong dimension, or a query that is not finite.
        """
        require_searchable(queries, dim=self.dim, k=parameters.k)
        depth = min(parameters.k + _EXTRA_FOR_TIES, max(self.num_vectors, 1))
        options = {}
        if self._num_partitions > 1:
            num_probes = self._num_partitions if parameters.exact else parameters.num_probes or self._default_num_probes
            options["params"] = self._faiss.SearchParametersIVF(nprobe=min(num_probes, self._num_partitions))
        scores, ids = self._index.search(np.ascontiguousarray(queries), depth, **options)
        return merge_hits([SearchHits(ids=ids, scores=scores)], k=parameters.k)

    def vectors_of(self, ids: Int64[ndarray, "n"]) -> Float32[ndarray, "n dim"]:
        """The stored vectors of `ids`.

        Raises:
            KeyError: an id is not in the index.
        """
        vectors = np.empty((len(ids), self.dim), np.float32)
        for row, identifier in enumerate(ids):
            try:
                vectors[row] = self._index.reconstruct(int(identifier))
            except RuntimeError:
                raise KeyError(int(identifier)) from None
        return vectors

    def ids(self) -> Int64[ndarray, "vectors"]:
        """All ids in ascending order."""
        if self._num_partitions == 1:
            return np.sort(self._faiss.vector_to_array(self._index.id_map))
        lists = self._index.invlists
        parts = [
            self._faiss.rev_swig_ptr(lists.get_ids(part), lists.list_size(part)).copy()
            for part in range(self._num_partitions)
            if lists.list_size(part)
        ]
        return np.sort(np.concatenate(parts))

    def write(self, path: Path) -> None:
        self._faiss.write_index(self._index, str(path))
