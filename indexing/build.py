"""Embedding set -> published index version, with its measured recall and latency."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from indexing.embedding_set import ENCODER_FOLDER, EmbeddingSet
from indexing.faiss_index import FaissSearcher, choose_type, create_faiss_index, num_partitions_of
from indexing.published_index import (
    FAISS_NAME,
    INDEX_KIND,
    INDEX_VERSION,
    METADATA_COLUMNS,
    METADATA_NAME,
    PublishedIndex,
    next_version,
    require_index_folder,
    set_current_version,
)
from indexing.settings import IndexSettings
from lookalike.artifacts import (
    Manifest,
    link_or_copy,
    locations_of,
    publishing,
    require_parent,
    write_manifest,
)
from lookalike.errors import ArtifactError, DataError
from lookalike.exact_search import exact_search
from lookalike.progress import track
from lookalike.records import SearchParameters
from lookalike.settings import dump_settings

_MEASURED_DEPTH = 10
_NUM_CANARIES = 8


def build_index(embeddings: EmbeddingSet, folder: Path, settings: IndexSettings = IndexSettings()) -> PublishedIndex:
    """Builds a new version under `folder`, measures and verifies it, and makes it the current one.

    A version made from the same embeddings and settings that is current already is kept as it is.

    Raises:
        ArtifactError: the shards that the embeddings came from have changed, or `folder` holds something else.
        DataError: vectors are not finite, or the finished index does not find known vectors under their ids.
    """
    require_index_folder(folder)
    existing = _current_if_same(embeddings, folder, settings)
    if existing is not None:
        return existing
    embeddings.check()
    shard_set = ShardSet.open(embeddings.shards_folder)
    require_parent(
        embeddings.folder, embeddings.manifest, "shards", found=shard_set.fingerprint, parent=shard_set.folder
    )
    vectors, ids = embeddings.vectors(), embeddings.ids
    index_type = choose_type(len(vectors), settings)
    started = time.perf_counter()
    index = create_faiss_index(index_type, vectors, ids, seed=settings.seed)
    build_seconds = time.perf_counter() - started
    searcher = FaissSearcher(index, index_type=index_type, default_num_probes=1)
    curve = measure_recall(searcher, vectors, ids, index_type=index_type, settings=settings)
    reached = [point for point in curve if point["recall_at_10"] >= settings.target_recall] or curve[-1:]
    default_num_probes = int(reached[0]["num_probes"])
    canaries = np.random.default_rng(settings.seed).choice(len(ids), min(_NUM_CANARIES, len(ids)), replace=False)
    _require_ids_found(searcher, vectors[canaries], ids[canaries])
    version = next_version(folder)
    details = {
        "dim": embeddings.dim,
        "num_vectors": len(ids),
        "metric": "inner product",
        "type": index_type,
        "default_num_probes": default_num_probes,
        "recall_curve": curve,
        "build_seconds": round(build_seconds, 3),
        "canary_ids": sorted(int(i) for i in ids[canaries]),
        "encoder_fingerprint": embeddings.manifest.details["encoder_fingerprint"],
        "transform_fingerprint": embeddings.manifest.details["transform_fingerprint"],
    }
    parents = {
        "embeddings": embeddings.fingerprint,
        "encoder": embeddings.manifest.parents["encoder"],
        "shards": shard_set.fingerprint,
    }
    with publishing(folder / version) as temporary:
        searcher.write(temporary / FAISS_NAME)
        _write_metadata(shard_set, temporary / METADATA_NAME)
        shutil.copytree(
            embeddings.folder / ENCODER_FOLDER,
            temporary / ENCODER_FOLDER,
            copy_function=lambda source, target: link_or_copy(Path(source), Path(target)),
        )
        locations = locations_of("shards", embeddings.shards_folder, artifact=folder / version)
        manifest = Manifest(INDEX_KIND, INDEX_VERSION, parents, details, dump_settings(settings), locations)
        write_manifest(temporary, manifest)
    set_current_version(folder, version)
    return PublishedIndex.open(folder)


def measure_recall(
    searcher: FaissSearcher,
    vectors: Float32[ndarray, "vectors dim"],
    ids: Int64[ndarray, "vectors"],
    *,
    index_type: str,
    settings: IndexSettings,
) -> list[dict[str, Any]]:
    """Recall of the exact 10 nearest (the query itself excluded) and milliseconds per query, per number of probes.

    Queries are members of the collection searched one at a time, as a server would.
    """
    chosen = np.random.default_rng(settings.seed).choice(
        len(vectors), min(settings.num_measured_queries, len(vectors)), replace=False
    )
    queries, query_ids = vectors[chosen], ids[chosen]
    depth = min(_MEASURED_DEPTH, len(vectors) - 1)
    if depth < 1:
        return [{"num_probes": 1, "recall_at_10": 1.0, "milliseconds_per_query": 0.0}]
    truth = exact_search(queries, vectors, ids, k=depth, excluded_ids=query_ids).ids
    num_partitions = num_partitions_of(index_type)
    probes = sorted({min(2**power, num_partitions) for power in range(num_partitions.bit_length() + 1)})
    curve = []
    for num_probes in track(probes, total=len(probes), description="measuring recall", unit="settings"):
        parameters = SearchParameters(k=depth + 1, num_probes=num_probes)
        started = time.perf_counter()
        found = [searcher.search(query[None], parameters).ids[0] for query in queries]
        seconds = time.perf_counter() - started
        hits = sum(
            len(np.intersect1d(ranked[ranked != own][:depth], exact))
            for ranked, own, exact in zip(found, query_ids, truth, strict=True)
        )
        curve.append(
            {
                "num_probes": num_probes,
                "recall_at_10": round(hits / (len(queries) * depth), 4),
                "milliseconds_per_query": round(1000 * seconds / len(queries), 3),
            }
        )
    return curve


def _require_ids_found(searcher: FaissSearcher, vectors: Float32[ndarray, "n dim"], ids: Int64[ndarray, "n"]) -> None:
    """A finished index must find known vectors under their own ids: guards against silently wrong ids.

    Raises:
        DataError: it does not.
    """
    hits = searcher.search(vectors, SearchParameters(k=min(_MEASURED_DEPTH, searcher.num_vectors), exact=True))
    for row, identifier in enumerate(ids):
        is_found = identifier in hits.ids[row]
        # More exact copies than places: all that stand before it must score the same.
        is_crowded_out = bool((hits.scores[row] >= vectors[row] @ vectors[row] - 1e-5).all())
        if not (is_found or is_crowded_out) or not np.allclose(searcher.vectors_of(ids[row : row + 1]), vectors[row]):
            raise DataError(f"the finished index does not find the vector of picture {identifier}; it is not published")


def _write_metadata(shard_set: ShardSet, path: Path) -> None:
    table = shard_set.samples.select(METADATA_COLUMNS).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _current_if_same(embeddings: EmbeddingSet, folder: Path, settings: IndexSettings) -> PublishedIndex | None:
    try:
        current = PublishedIndex.open(folder)
    except ArtifactError:
        return None
    same_parent = current.manifest.parents["embeddings"] == embeddings.fingerprint
    same_settings = current.manifest.settings == dump_settings(settings)
    return current if same_parent and same_settings else None
