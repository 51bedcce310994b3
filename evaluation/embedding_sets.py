"""Embedding sets of the same pictures, judged on the pictures' own classes: what `lookalike evaluate SETS` does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from evaluation.benchmarks import ClassProtocol
from evaluation.classes.given_rankings import judge_rankings
from evaluation.classes.pictures import have_company
from evaluation.classes.protocols import leave_one_out
from evaluation.compare import compare_results, difference_lines
from evaluation.galleries import spread_queries
from evaluation.outputs import precision_recall_of
from evaluation.pictures_of_shards import class_pictures
from evaluation.protocols import CLASS_PROTOCOLS, NO_CROP
from evaluation.raw_pixels import raw_pixel_vectors
from evaluation.record import UNKNOWN, record_of_embeddings
from evaluation.reporting.folder import REPORT_NAME, read_baselines, read_report, require_replaceable, write_report
from evaluation.reporting.values import Contender
from evaluation.result import Result, summary_tree, table_lines
from indexing.embedding_set import ENCODER_FOLDER, EmbeddingSet
from indexing.published_index import PublishedIndex
from lookalike.artifacts import fingerprint, require_parent
from lookalike.encoder import load_encoder
from lookalike.errors import ManifestMismatch
from lookalike.records import SearchParameters

# Changes whenever the same vectors would give other numbers: finished evaluations are then made anew.
PROTOCOL_VERSION = 2
SECTION: ClassProtocol = "leave_one_out"
RAW_PIXELS = "raw pixels"


@dataclass(frozen=True)
class _Set:
    """The pictures of an embedding set with their vectors."""

    ids: Int64[ndarray, "pictures"]
    vectors: Float32[ndarray, "pictures dim"]
    labels: Int64[ndarray, "pictures"]
    names: list[str]


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

    The last set is the result, the others are baselines that it is compared with, query by query.

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
        finished = read_report(out, parents=parents, settings=settings) if out else None
        if out and finished:
            return _told([*read_baselines(out), Contender(names[-1], finished)], out)
        contenders = [_raw_pixels(shard_set, sets[-1], ks)] if with_raw_pixels else []
        for name, embeddings in zip(names, sets, strict=True):
            ranked_by = index if embeddings is sets[-1] else None
            contenders.append(Contender(name, _judge(shard_set, embeddings, ranked_by, ks)))
        if out:
            options = ["--raw-pixels"] * with_raw_pixels + [f"--index {index_folder}"] * bool(index_folder)
            command = " ".join(["lookalike evaluate", *map(str, folders), *options, f"--ks {','.join(map(str, ks))}"])
            *others, own = (_pictures_of(shard_set, embeddings) for embeddings in sets)
            pictures = class_pictures(
                SECTION,
                contenders[-1].result.sections[SECTION],
                shard_set,
                own,
                own,
                choose=spread_queries,
                rivals=dict(zip(names[:-1], others, strict=True)),
            )
            write_report(
                out,
                contenders[-1].result,
                name=names[-1],
                title=title,
                command=command,
                baselines=contenders[:-1],
                galleries=pictures.galleries,
                precision_recall=precision_recall_of(contenders[-1].result),
                parents=parents,
                settings=settings,
            )
        return _told(contenders, out)


def _told(contenders: Sequence[Contender], out: Path | None) -> tuple[dict[str, Any], list[str]]:
    *others, last = contenders
    differences = {f"{last.name} over {other.name}": compare_results(other.result, last.result) for other in others}
    tree = {
        "contenders": {contender.name: summary_tree(contender.result) for contender in contenders},
        "lead": {
            name: {metric: own.as_json() for metric, own in sections[SECTION].items()}
            for name, sections in differences.items()
        },
    }
    lines = _table(contenders)
    for name, sections in differences.items():
        lines += difference_lines(name, sections[SECTION], only=("hit_rate@1", "map@r"))
    return tree, [*lines, f"report: {out / REPORT_NAME}"] if out else lines


def _table(contenders: Sequence[Contender]) -> list[str]:
    """One column per contender."""
    sections = {contender.name: contender.result.sections[SECTION] for contender in contenders}
    last = contenders[-1].result
    warnings = [warning for contender in contenders for warning in contender.result.warnings]
    facts = last.sections[SECTION].facts
    about = f"{last.record['protocol']}; {facts['num_gallery']:,} in the gallery; in percent"
    return [about, *table_lines(Result(last.benchmark, sections, last.record, warnings))]


def _judge(shard_set: ShardSet, embeddings: EmbeddingSet, index: PublishedIndex | None, ks: Sequence[int]) -> Result:
    pictures = _pictures_of(shard_set, embeddings)
    kept = have_company(pictures.labels)
    search = None
    if index is None:
        section = leave_one_out(pictures.vectors, pictures.ids, pictures.labels, ks=ks, names=pictures.names)
    else:
        largest_class = int(np.unique(pictures.labels, return_counts=True)[1].max())
        # One more, since the query itself is among the hits.
        search = SearchParameters(k=min(1 + max(*ks, largest_class), index.num_vectors))
        hits = index.search(pictures.vectors[kept], search)
        names = [name for name, is_kept in zip(pictures.names, kept, strict=True) if is_kept]
        section = judge_rankings(
            hits.ids, pictures.ids[kept], pictures.labels[kept], pictures.ids, pictures.labels, ks=ks, names=names
        )
    record = record_of_embeddings(
        "classes",
        CLASS_PROTOCOLS[SECTION],
        {"gallery": embeddings.manifest},
        load_encoder(embeddings.folder / ENCODER_FOLDER).settings,
        ground_truth=_truth_of(shard_set, embeddings),
        ties="index",
        crop=NO_CROP,
        index=index.manifest if index else None,
        search=search,
    )
    return Result("classes", {SECTION: section}, record.as_json())


def _raw_pixels(shard_set: ShardSet, like: EmbeddingSet, ks: Sequence[int]) -> Contender:
    vectors, ids = raw_pixel_vectors(shard_set, like.manifest.details["split"])
    kept = np.isin(ids, like.ids)
    section = leave_one_out(
        vectors[kept], ids[kept], shard_set.labels[ids[kept]], ks=ks, names=_names(shard_set, ids[kept])
    )
    record: Mapping[str, Any] = {
        "benchmark": "classes",
        "protocol": CLASS_PROTOCOLS[SECTION],
        "ground_truth": _truth_of(shard_set, like),
        "encoder_fingerprint": "none: pixels of 32x32, mean removed",
        "index_type": "none",
        "whitening": UNKNOWN,
    }
    return Contender(RAW_PIXELS, Result("classes", {SECTION: section}, record))


def _pictures_of(shard_set: ShardSet, embeddings: EmbeddingSet) -> _Set:
    ids = embeddings.ids
    return _Set(ids, embeddings.vectors(), shard_set.labels[ids], _names(shard_set, ids))


def _names(shard_set: ShardSet, ids: Int64[ndarray, "pictures"]) -> list[str]:
    return [str(key) for key in shard_set.samples["key"].take(ids).to_pylist()]


def _truth_of(shard_set: ShardSet, embeddings: EmbeddingSet) -> str:
    return fingerprint([shard_set.fingerprint, embeddings.ids.tolist()])


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _open_index(embeddings: EmbeddingSet, folder: Path) -> PublishedIndex:
    index = PublishedIndex.open(folder)
    require_parent(index.folder, index.manifest, "embeddings", found=embeddings.fingerprint, parent=embeddings.folder)
    return index
