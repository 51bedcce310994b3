"""Embedding sets -> contenders -> numbers and report: what `lookalike evaluate` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shard_set import ShardSet
from evaluation.leave_one_out import Ranker, evaluate_leave_one_out, without_query
from evaluation.raw_pixels import raw_pixel_vectors
from evaluation.report import (
    REPORT_NAME,
    Contender,
    read_evaluation,
    require_replaceable,
    summarise,
    table_lines,
    write_evaluation,
)
from indexing.embedding_set import EmbeddingSet
from indexing.published_index import PublishedIndex
from lookalike.artifacts import require_parent
from lookalike.errors import ManifestMismatch
from lookalike.records import SearchParameters

# Changes whenever the same vectors would give other numbers: finished evaluations are then made anew.
PROTOCOL_VERSION = 1


def evaluate_embedding_sets(
    folders: Sequence[Path],
    *,
    names: Sequence[str] | None = None,
    index_folder: Path | None = None,
    with_raw_pixels: bool = False,
    ks: Sequence[int] = (1, 5, 10),
    out: Path | None = None,
    title: str = "Retrieval quality",
) -> tuple[dict[str, Any], list[str]]:
    """Evaluates embedding sets of the same pictures and returns the numbers, as JSON and as lines of text.

    Args:
        names: Shown for each set; folder names where None.
        index_folder: Ranks the last set by an index; its share of the exact neighbours is not measured here.
        out: Where to publish numbers and report; nothing is written where None. An evaluation of the same sets with
            the same settings that is there already is read instead.

    Raises:
        ManifestMismatch: the sets hold different pictures, or the index was built from another set.
    """
    if out:
        require_replaceable(out)
    sets = [EmbeddingSet.open(folder) for folder in folders]
    with ShardSet.open(sets[-1].shards_folder) as shard_set:
        for embeddings in sets:
            require_parent(
                embeddings.folder, embeddings.manifest, "shards", found=shard_set.fingerprint, parent=shard_set.folder
            )
            if not np.array_equal(embeddings.ids, sets[-1].ids):
                raise ManifestMismatch(
                    f"{embeddings.folder} and {sets[-1].folder} hold different pictures; a comparison needs the same. "
                    "Embed both with the same --split."
                )
        names = list(names or _distinct_names(folders))
        index = _open_index(sets[-1], index_folder) if index_folder else None
        parents = {"shards": shard_set.fingerprint, **{f"embeddings {i}": e.fingerprint for i, e in enumerate(sets)}}
        if index:
            parents["index"] = index.fingerprint
        settings = {
            "protocol_version": PROTOCOL_VERSION,
            "names": names,
            "ks": list(ks),
            "with_raw_pixels": with_raw_pixels,
            "title": title,
        }
        finished = read_evaluation(out, parents=parents, settings=settings) if out else None
        if out and finished:
            return finished, [*table_lines(finished), f"report: {out / REPORT_NAME}"]
        contenders = []
        if with_raw_pixels:
            contenders.append(_raw_pixels(shard_set, sets[-1], ks))
        for name, embeddings in zip(names, sets, strict=True):
            rank = _index_ranker(index) if index and embeddings is sets[-1] else None
            result = evaluate_leave_one_out(
                embeddings.vectors(), embeddings.ids, shard_set.labels[embeddings.ids], ks=ks, rank=rank
            )
            provenance = {
                "encoder": embeddings.manifest.details["encoder_fingerprint"][:12],
                "transform": embeddings.manifest.details["transform_fingerprint"][:12],
                "skipped": embeddings.manifest.details["num_skipped"],
                "ranked by": str(index_folder) if rank else "brute force",
            }
            contenders.append(Contender(name, result, provenance))
        if out is None:
            summary = summarise(contenders)
            return summary, table_lines(summary)
        options = ["--raw-pixels"] * with_raw_pixels + [f"--index {index_folder}"] * bool(index_folder)
        command = " ".join(["lookalike evaluate", *map(str, folders), *options, f"--ks {','.join(map(str, ks))}"])
        summary = write_evaluation(
            out, contenders, shard_set, parents=parents, settings=settings, title=title, command=command
        )
        return summary, [*table_lines(summary), f"report: {out / REPORT_NAME}"]


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _raw_pixels(shard_set: ShardSet, like: EmbeddingSet, ks: Sequence[int]) -> Contender:
    vectors, ids = raw_pixel_vectors(shard_set, like.manifest.details["split"])
    kept = np.isin(ids, like.ids)
    result = evaluate_leave_one_out(vectors[kept], ids[kept], shard_set.labels[ids[kept]], ks=ks)
    return Contender("raw pixels", result, {"transform": "32x32, mean removed", "ranked by": "brute force"})


def _open_index(embeddings: EmbeddingSet, folder: Path) -> PublishedIndex:
    index = PublishedIndex.open(folder)
    require_parent(index.folder, index.manifest, "embeddings", found=embeddings.fingerprint, parent=embeddings.folder)
    return index


def _index_ranker(index: PublishedIndex) -> Ranker:
    def rank(queries: np.ndarray, query_ids: np.ndarray, depth: int) -> np.ndarray:
        return without_query(index.search(queries, SearchParameters(k=depth + 1)).ids, query_ids)

    return rank
