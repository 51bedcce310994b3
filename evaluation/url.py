"""A running server, judged over its HTTP API as its users see it: what `lookalike evaluate url` does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from evaluation.benchmarks import Benchmark, ClassBenchmark, LandmarkBenchmark, RetrievalBenchmark
from evaluation.classes.given_rankings import judge_rankings
from evaluation.compare import compare_results, open_result
from evaluation.gldv2.retrieval import score_retrieval
from evaluation.gldv2.solutions import read_retrieval_solution
from evaluation.gldv2.submissions import MAX_IMAGES
from evaluation.live_server import PictureQuery, ServerRankings, ask_server
from evaluation.outputs import Outputs, conclude
from evaluation.protocols import (
    CLASS_PROTOCOLS,
    CROP,
    LANDMARK_PROTOCOL,
    NO_CROP,
    RETRIEVAL_PROTOCOL,
    require_official_size,
    retrieval_sections,
)
from evaluation.record import record_of_server
from evaluation.result import Result, Section
from evaluation.revisited.ground_truth import load_ground_truth
from evaluation.revisited.pictures import keys_in_shards, queries_in_folder, rows_in_shards
from evaluation.revisited.rankings import evaluate_rankings
from lookalike.artifacts import file_sha256, fingerprint
from lookalike.errors import ManifestMismatch, SettingsError


@dataclass(frozen=True, slots=True)
class UrlOptions:
    """Where the queries come from, and how the server is asked."""

    url: str
    shards: Path | None = None  # shard set that the server's index was made from
    folder: Path | None = None  # Oxford or Paris in the official layout: whole pictures, sent with their region
    ground_truth: Path | None = None
    solution: Path | None = None
    is_exact: bool = False
    depth: int = 10_000  # hits asked for at most
    num_connections: int = 4
    offline: Path | None = None  # result of the same benchmark, computed offline


@dataclass(frozen=True)
class _Judged:
    sections: dict[str, Section]
    rankings: ServerRankings
    protocol: str
    ground_truth: str
    crop: str = NO_CROP
    num_distractors: int = 0


def evaluate_url(benchmark: Benchmark, options: UrlOptions, outputs: Outputs) -> tuple[dict[str, Any], list[str]]:
    """Sends every query picture of the benchmark and judges the answers.

    Where the server's lists end before all relevant pictures are found, metrics that need the rest are bounded.

    Raises:
        SettingsError: an option is missing.
        ResourceError: the server does not answer.
        ManifestMismatch: the server's index was not made from these shards.
        DataError: files do not fit.
    """
    outputs.check()
    match benchmark:
        case ClassBenchmark():
            judged = _ask_for_classes(benchmark, options)
        case LandmarkBenchmark():
            judged = _ask_for_landmarks(benchmark, options)
        case RetrievalBenchmark():
            judged = _ask_for_retrieval(benchmark, options)
    record = record_of_server(
        benchmark.name,
        judged.protocol,
        judged.rankings.info,
        url=options.url,
        num_queries=len(judged.rankings.hits),
        ground_truth=judged.ground_truth,
        crop=judged.crop,
        k=judged.rankings.k,
        is_exact=judged.rankings.is_exact,
        num_distractors=judged.num_distractors,
    )
    result = Result(benchmark.name, judged.sections, record.as_json())
    tree, lines = conclude(result, outputs, name=options.url, title=f"Retrieval quality of a server: {benchmark.name}")
    if options.offline:
        lines += _difference_to_offline(options.offline, result)
    return tree, lines


def _ask_for_classes(benchmark: ClassBenchmark, options: UrlOptions) -> _Judged:
    with ShardSet.open(_required(options.shards, "--shards", benchmark)) as shard_set:
        gallery = shard_set.rows(benchmark.gallery_split)
        rows = shard_set.rows(benchmark.query_split) if benchmark.query_split else gallery
        labels = shard_set.labels
        if not benchmark.query_split:
            # A picture alone in its class can be found by nobody.
            _, members, sizes = np.unique(labels[rows], return_inverse=True, return_counts=True)
            rows = rows[(sizes[members] > 1) & (labels[rows] >= 0)]
        largest_class = int(np.unique(labels[gallery], return_counts=True)[1].max())
        k = 1 + max(*benchmark.ks, min(largest_class, options.depth))
        rankings = _ask(options, _queries_of(shard_set, rows), k=k)
        ids = _ids_of_hits(rankings)
        _require_same_pictures(rankings, shard_set, options.url)
        section = judge_rankings(
            ids,
            rows,
            labels[rows],
            gallery,
            labels[gallery],
            ks=benchmark.ks,
            names=[shard_set.key(row) for row in rows],
        )
        truth = fingerprint([shard_set.fingerprint, benchmark.gallery_split, benchmark.query_split])
    name = "query_gallery" if benchmark.query_split else "leave_one_out"
    return _Judged({name: section}, rankings, CLASS_PROTOCOLS[name], truth)  # type: ignore[index]


def _ask_for_landmarks(benchmark: LandmarkBenchmark, options: UrlOptions) -> _Judged:
    file = _required(options.ground_truth, "--ground-truth", benchmark)
    truth = load_ground_truth(file)
    require_official_size(truth, benchmark, file)
    if options.folder:
        rankings = _ask(options, queries_in_folder(benchmark.name, options.folder, truth), k=options.depth)
    else:
        shards = _required(options.shards, "--folder with the official pictures, or --shards", benchmark)
        with ShardSet.open(shards) as shard_set:
            rows = rows_in_shards(truth.query_names, shard_set, split=benchmark.query_split)
            queries = [
                replace(query, name=name)
                for query, name in zip(_queries_of(shard_set, rows), truth.query_names, strict=True)
            ]
            rankings = _ask(options, queries, k=options.depth)
    keys = keys_in_shards(truth.database_names, split=benchmark.gallery_split)
    row_of_key = {key: row for row, key in enumerate(keys)}
    num_distractors = rankings.info.num_vectors - len(keys)
    if num_distractors < 0:
        raise ManifestMismatch(
            f"{options.url} serves {rankings.info.num_vectors} pictures, {benchmark.name} has {len(keys)}."
        )
    ranked = np.full((len(rankings.hits), max(map(len, rankings.hits), default=0)), -1, np.int64)
    others: dict[str, int] = {}
    for query, hits in enumerate(rankings.hits):
        for position, hit in enumerate(hits):
            row = row_of_key.get(hit.key)
            ranked[query, position] = len(keys) + others.setdefault(hit.key, len(others)) if row is None else row
    outcome = evaluate_rankings(ranked, truth, num_distractors=num_distractors)
    sections: dict[str, Section] = {str(name): section for name, section in outcome.sections.items()}
    return _Judged(sections, rankings, LANDMARK_PROTOCOL, truth.sha256, CROP, num_distractors)


def _ask_for_retrieval(benchmark: RetrievalBenchmark, options: UrlOptions) -> _Judged:
    file = _required(options.solution, "--solution", benchmark)
    solution = read_retrieval_solution(file)
    with ShardSet.open(_required(options.shards, "--shards", benchmark)) as shard_set:
        all_rows = shard_set.rows(benchmark.query_split)
        names = [shard_set.key(row).rpartition("/")[2] for row in all_rows]
        scored = [place for place, name in enumerate(names) if name in solution.usages]
        rankings = _ask(options, _queries_of(shard_set, all_rows[scored]), k=MAX_IMAGES)
    predictions = {
        names[place]: [hit.key.rpartition("/")[2] for hit in hits]
        for place, hits in zip(scored, rankings.hits, strict=True)
    }
    sections = retrieval_sections(score_retrieval(predictions, solution), {})
    return _Judged(sections, rankings, RETRIEVAL_PROTOCOL, file_sha256(file))


def _ask(options: UrlOptions, queries: Sequence[PictureQuery], *, k: int) -> ServerRankings:
    return ask_server(options.url, queries, k=k, exact=options.is_exact, num_connections=options.num_connections)


def _queries_of(shard_set: ShardSet, rows: Int64[ndarray, "queries"]) -> list[PictureQuery]:
    return [PictureQuery(shard_set.key(row), partial(shard_set.read_bytes, int(row))) for row in rows]


def _ids_of_hits(rankings: ServerRankings) -> Int64[ndarray, "queries depth"]:
    ids = np.full((len(rankings.hits), max(map(len, rankings.hits), default=0)), -1, np.int64)
    for query, hits in enumerate(rankings.hits):
        ids[query, : len(hits)] = [hit.id for hit in hits]
    return ids


def _require_same_pictures(rankings: ServerRankings, shard_set: ShardSet, url: str) -> None:
    """Ids have a meaning only where they are rows of the same shards."""
    keys = shard_set.samples["key"].to_pylist()
    for hit in (hit for hits in rankings.hits for hit in hits):
        if hit.id >= len(keys) or keys[hit.id] != hit.key:
            here = keys[hit.id] if hit.id < len(keys) else "none"
            raise ManifestMismatch(
                f"{url} calls picture {hit.id} {hit.key}, in {shard_set.folder} it is {here}. Give the shards that its "
                "index was made from."
            )


def _required(path: Path | None, option: str, benchmark: Benchmark) -> Path:
    if path is None:
        raise SettingsError(f"{benchmark.name} needs {option}.")
    return path


def _difference_to_offline(offline: Path, live: Result) -> list[str]:
    lines = []
    for section, metrics in compare_results(open_result(offline), live).items():
        for name, difference in metrics.items():
            lines.append(f"live minus offline, {section} {name}: {difference.difference:+.2f}")
    return lines or ["live minus offline: no metric is known of both"]
