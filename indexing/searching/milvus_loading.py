"""Fills a Milvus collection from a vector source: resumable, counted, spot-checked, measured."""

import logging
import time
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from indexing.index_types import IndexType
from indexing.searching.milvus import MilvusSearcher
from indexing.searching.milvus_collection import MilvusCollection
from indexing.searching.milvus_layout import GalleryProperties, MilvusIndexType, columns_of, new_rows
from indexing.searching.recall_curve import RecallCurve, RecallPoint
from indexing.vector_source import VectorSource
from lookalike.errors import DataError, ManifestMismatch
from lookalike.exact_search import exact_search, merge_hits
from lookalike.progress import Progress
from lookalike.records import Effort, SearchHits, SearchParameters

_ROWS_PER_BATCH = 1000
_NUM_SPOT_CHECKS = 10
_NUM_MEASURED_QUERIES = 200
_SECONDS_BETWEEN_LOOKS = 1.0
_CANDIDATES_PER_HIT = {"SQ8": 4, "RaBitQ": 10}  # scored from their vectors: a codec's own order is too coarse
_LEAST_BREADTH = 16
_MOST_BREADTH = 4096
_log = logging.getLogger(__name__)


def load_into_milvus(
    source: VectorSource, uri: str, name: str, index_type: IndexType, *, recall: float = 0.99, at: int = 10
) -> MilvusSearcher:
    """Loads all vectors and metadata; called again after an interruption it continues, and after the end it only opens.

    Args:
        recall: Share of the exact `at` nearest that searches find where they do not ask for something else; of an index
            that is not `Flat`. The curve is measured on vectors of the gallery, and stands in the collection.

    Raises:
        SettingsError: Milvus has no such index type, or `uri` or `name` is not valid.
        ManifestMismatch: the collection holds, or was begun with, another gallery or index type.
        DataError: metadata that Milvus cannot store; vectors that are not there, or not the same, after the load.
        ResourceError: pymilvus is not installed, nothing answers at `uri`, or the server fails.
    """
    MilvusIndexType.of(index_type)  # refuses before the first slow step
    collection = MilvusCollection(uri, name)
    try:
        is_begun = collection.exists()
        if not is_begun:
            columns = columns_of(source.metadata_of(np.zeros(0, np.int64)).schema)
            collection.create(source.dim, GalleryProperties(source.fingerprint, index_type, False, columns))
        begun = collection.properties()
        if (begun.source, begun.index_type) != (source.fingerprint, index_type):
            raise ManifestMismatch(
                f"{collection} holds gallery {begun.source[:12]} under {begun.index_type.name}, not "
                f"{source.fingerprint[:12]} under {index_type.name}. Choose another name, or drop the collection."
            )
        collection.ensure_index(index_type)
        facts = collection.describe()
        collection.load()
        if not begun.is_loaded:
            _write(source, collection, begun, is_continued=is_begun)
            loaded = MilvusSearcher(collection, facts)
            _verify(source, loaded)
            curve, default_effort = _measure(source, loaded, recall=recall, at=at)
            collection.write_properties(replace(begun, is_loaded=True, curve=curve, default_effort=default_effort))
        return MilvusSearcher(collection, collection.describe())
    except BaseException:
        collection.close()
        raise


def _write(
    source: VectorSource, collection: MilvusCollection, properties: GalleryProperties, *, is_continued: bool
) -> None:
    with Progress(source.num_vectors, description=f"loading {collection}", unit="vectors") as progress:
        for block in source.blocks():
            for start in range(0, len(block.ids), _ROWS_PER_BATCH):
                ids = block.ids[start : start + _ROWS_PER_BATCH]
                vectors = np.asarray(block.vectors[start : start + _ROWS_PER_BATCH], np.float32)
                num_rows = len(ids)
                if is_continued:  # rows are written whole or not at all
                    is_missing = ~np.isin(ids, list(collection.rows_of(ids.tolist(), [])))
                    ids, vectors = ids[is_missing], vectors[is_missing]
                if len(ids):
                    try:
                        rows = new_rows(ids, vectors, source.metadata_of(ids).to_pylist(), properties.columns)
                    except ValueError as error:
                        raise DataError(f"{error} Leave the column out of the metadata.") from error
                    collection.upsert(rows)
                progress.advance(num_rows)
    collection.flush()
    while num_pending := collection.describe().num_pending:
        _log.info("%s: %d vectors are still to be indexed", collection, num_pending)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _verify(source: VectorSource, loaded: MilvusSearcher) -> None:
    """Raises DataError unless all vectors are there, and some of them, spread over the gallery, are what they were."""
    if loaded.num_vectors != source.num_vectors:
        raise DataError(
            f"{loaded.collection} holds {loaded.num_vectors} vectors after the load, the gallery {source.num_vectors}. "
            "Did another program write to it? Drop it, and load again."
        )
    ids, vectors = _some_vectors(source, _NUM_SPOT_CHECKS, seed=1)
    stored = loaded.vectors_of(ids)
    if not (stored == vectors).all():
        wrong = int(ids[(stored != vectors).any(axis=1)][0])
        raise DataError(f"{loaded.collection}: picture {wrong} has another vector than in the gallery. Load again.")


def _measure(
    source: VectorSource, loaded: MilvusSearcher, *, recall: float, at: int
) -> tuple[RecallCurve, Effort | None]:
    """The curve of an approximate index, and the least effort that reaches `recall` (the greatest where none does)."""
    index_type = loaded.facts.properties.index_type
    if index_type.family == "flat":
        return RecallCurve(), None
    ids, queries = _some_vectors(source, min(_NUM_MEASURED_QUERIES, source.num_vectors), seed=0)
    nearest = merge_hits(
        [
            exact_search(queries, np.asarray(block.vectors, np.float32), block.ids, k=at, excluded_ids=ids)
            for block in source.blocks()
        ],
        k=at,
    )
    points: list[RecallPoint] = []
    for effort in _efforts(index_type, source.num_vectors):
        hits = loaded.search(queries, SearchParameters(k=at + 1, effort=effort))
        points.append(RecallPoint(effort, round(_share_found(hits, nearest, ids), 4)))
        _log.info("%s: recall@%d %.4f at %s", loaded.collection, at, points[-1].recall, effort)
        if points[-1].recall >= 1:
            break
    curve = RecallCurve(tuple(points))
    return curve, curve.effort_for(recall) or max(points, key=lambda point: point.recall).effort


def _efforts(index_type: IndexType, num_vectors: int) -> list[Effort]:
    """Ascending, each twice the one before, up to the one that leaves nothing out."""
    candidates = 1 if index_type.codec == "Flat" else _CANDIDATES_PER_HIT[index_type.codec]
    if index_type.family == "hnsw":
        steps = _doubling(_LEAST_BREADTH, min(num_vectors, _MOST_BREADTH))
        return [Effort(breadth=step, candidates_per_hit=candidates) for step in steps]
    steps = _doubling(1, index_type.num_partitions)
    return [Effort(num_probes=step, candidates_per_hit=candidates) for step in steps]


def _doubling(least: int, most: int) -> list[int]:
    steps = [min(least, most)]
    while steps[-1] < most:
        steps.append(min(2 * steps[-1], most))
    return steps


def _share_found(hits: SearchHits, nearest: SearchHits, own_ids: Int64[ndarray, "queries"]) -> float:
    """Of the `at` nearest others, those among the hits; the query itself, which every search finds, counts as none."""
    shares = []
    for found, wanted, own in zip(hits.ids, nearest.ids, own_ids, strict=True):
        wanted = wanted[wanted >= 0]
        others = found[found != own][: len(wanted)]
        if len(wanted):
            shares.append(np.isin(wanted, others).mean())
    return float(np.mean(shares)) if shares else 1.0


def _some_vectors(
    source: VectorSource, count: int, *, seed: int
) -> tuple[Int64[ndarray, "some"], Float32[ndarray, "some dim"]]:
    """Drawn at random, the same for the same seed; one pass over the source."""
    if not source.num_vectors:
        return np.zeros(0, np.int64), np.zeros((0, source.dim), np.float32)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(source.num_vectors, size=min(count, source.num_vectors), replace=False))
    ids, vectors, start = [], [], 0
    for block in source.blocks():
        rows = chosen[(chosen >= start) & (chosen < start + len(block.ids))] - start
        ids.append(block.ids[rows])
        vectors.append(np.asarray(block.vectors[rows], np.float32))
        start += len(block.ids)
    return np.concatenate(ids), np.concatenate(vectors)
