"""A running server, judged over its HTTP API as its users see it: what `lookalike evaluate url` does."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from evaluation.benchmarks import Benchmark, ClassBenchmark, ClassProtocol, LandmarkBenchmark, RetrievalBenchmark
from evaluation.classes.given_rankings import judge_rankings
from evaluation.classes.pictures import have_company
from evaluation.compare import compare_results, open_result, remarks
from evaluation.gldv2.retrieval import score_retrieval
from evaluation.gldv2.solutions import read_retrieval_solution
from evaluation.gldv2.submissions import MAX_IMAGES
from evaluation.live_server import PictureQuery, ServerRankings, ask_server, served_items
from evaluation.outputs import Outputs, conclude
from evaluation.protocols import (
    CROP,
    LANDMARK_PROTOCOL,
    NO_CROP,
    RETRIEVAL_PROTOCOL,
    class_protocol,
    require_official_size,
    retrieval_sections,
)
from evaluation.record import record_of_server
from evaluation.result import Result, Section
from evaluation.revisited.ground_truth import load_ground_truth
from evaluation.revisited.pictures import keys_in_shards, queries_in_folder, rows_in_shards
from evaluation.revisited.rankings import evaluate_rankings
from evaluation.served_gallery import ServedGallery
from lookalike.api_answers import Hit, ServerInfo
from lookalike.artifacts import file_sha256, fingerprint
from lookalike.errors import DataError, ManifestMismatch, SettingsError


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
    api_key: str | None = field(default=None, repr=False)  # for servers that want one


@dataclass(frozen=True)
class _Asked:
    """Whom, and how."""

    info: ServerInfo
    num_queries: int
    k: int
    is_exact: bool
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, rankings: ServerRankings[ndarray]) -> "_Asked":
        return cls(rankings.info, len(rankings.answers), rankings.k, rankings.is_exact, rankings.warnings)


@dataclass(frozen=True)
class _Judged:
    sections: Mapping[str, Section]
    asked: _Asked
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
        judged.asked.info,
        url=options.url,
        num_queries=judged.asked.num_queries,
        ground_truth=judged.ground_truth,
        crop=judged.crop,
        k=judged.asked.k,
        is_exact=judged.asked.is_exact,
        num_distractors=judged.num_distractors,
    )
    result = Result(benchmark.name, judged.sections, record.as_json(), judged.asked.warnings)
    tree, lines = conclude(result, outputs, name=options.url, title=f"Retrieval quality of a server: {benchmark.name}")
    if options.offline:
        lines += _difference_to_offline(options.offline, result)
    return tree, lines


def _ask_for_classes(benchmark: ClassBenchmark, options: UrlOptions) -> _Judged:
    with ShardSet.open(_required(options.shards, "--shards", benchmark)) as shard_set:
        gallery = shard_set.rows(benchmark.gallery_split)
        rows = shard_set.rows(benchmark.query_split) if benchmark.query_split else gallery
        labels = shard_set.labels
        if (labels[gallery] < 0).any() or (labels[rows] < 0).any():
            raise DataError(f"{shard_set.folder} holds pictures without a class, so their answers cannot be judged.")
        if not benchmark.query_split:
            rows = rows[have_company(labels[rows])]
        largest_class = int(np.unique(labels[gallery], return_counts=True)[1].max())
        k = 1 + max(*benchmark.ks, min(largest_class, options.depth))
        served = _gallery_of(shard_set, benchmark.gallery_split, options)
        rankings = _ask_within(served, options, _queries_of(shard_set, rows), k=k)
        section = judge_rankings(
            _padded(rankings.answers),
            rows,
            labels[rows],
            gallery,
            labels[gallery],
            ks=benchmark.ks,
            names=[shard_set.key(row) for row in rows],
        )
        truth = fingerprint([shard_set.fingerprint, benchmark.gallery_split, benchmark.query_split])
    name: ClassProtocol = "query_gallery" if benchmark.query_split else "leave_one_out"
    return _Judged({name: section}, _Asked.of(rankings), class_protocol([name], benchmark), truth)


def _ask_for_landmarks(benchmark: LandmarkBenchmark, options: UrlOptions) -> _Judged:
    file = _required(options.ground_truth, "--ground-truth", benchmark)
    truth = load_ground_truth(file)
    require_official_size(truth, benchmark, file)
    keys = keys_in_shards(truth.database_names, split=benchmark.gallery_split)
    places = _PlacesOfKeys(
        {key: row for row, key in enumerate(keys)},
        frozenset(keys_in_shards(truth.query_names, split=benchmark.query_split)),
        options.url,
    )
    if options.folder:
        queries = queries_in_folder(benchmark.name, options.folder, truth)
        rankings = _ask(options, queries, places, k=options.depth)
    else:
        shards = _required(options.shards, "--folder with the official pictures, or --shards", benchmark)
        with ShardSet.open(shards) as shard_set:
            rows = rows_in_shards(truth.query_names, shard_set, split=benchmark.query_split)
            queries = [
                replace(query, name=name)
                for query, name in zip(_queries_of(shard_set, rows), truth.query_names, strict=True)
            ]
            rankings = _ask(options, queries, places, k=options.depth)
    num_distractors = rankings.info.num_vectors - len(keys)
    _require_database(rankings, places, num_distractors, benchmark, options.url)
    outcome = evaluate_rankings(_padded(rankings.answers), truth, num_distractors=num_distractors)
    sections: dict[str, Section] = {str(name): section for name, section in outcome.sections.items()}
    return _Judged(sections, _Asked.of(rankings), LANDMARK_PROTOCOL, truth.sha256, CROP, num_distractors)


class _PlacesOfKeys:
    """Hits -> rows of the ground truth; other pictures are distractors, numbered behind the database."""

    def __init__(self, row_of_key: Mapping[str, int], query_keys: frozenset[str], url: str) -> None:
        self.row_of_key, self._query_keys, self._url = row_of_key, query_keys, url
        self._others: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, hits: tuple[Hit, ...]) -> Int64[ndarray, "hits"]:
        with self._lock:  # answers come on several threads
            return np.array([self._place(hit) for hit in hits], np.int64)

    def _place(self, hit: Hit) -> int:
        key = hit.key or f"id {hit.id}"
        if key in self._query_keys:
            raise ManifestMismatch(
                f"the index of {self._url} holds the query {key}, which would find itself. Build it from an embedding "
                "set of the gallery alone."
            )
        row = self.row_of_key.get(key)
        return len(self.row_of_key) + self._others.setdefault(key, len(self._others)) if row is None else row


def _require_database(
    rankings: ServerRankings[ndarray],
    places: _PlacesOfKeys,
    num_distractors: int,
    benchmark: LandmarkBenchmark,
    url: str,
) -> None:
    """Raises ManifestMismatch unless the server's gallery can be the database with so many distractors."""
    num_served, num_sampled = rankings.info.num_vectors, len(rankings.sampled_keys)
    num_database = len(places.row_of_key)
    num_known = sum(key in places.row_of_key for key in rankings.sampled_keys)
    finds_any = any((answer < num_database).any() for answer in rankings.answers)
    share = min(1.0, num_database / max(1, num_served))
    # Six deviations of a binomial count: a gallery that fits fails once in a hundred million times.
    is_plausible = abs(num_known - share * num_sampled) <= 6 * (num_sampled * share * (1 - share)) ** 0.5
    if num_distractors < 0 or not finds_any or not is_plausible:
        raise ManifestMismatch(
            f"{url} serves {num_served:,} pictures, and {num_known} of {num_sampled} random ones are of the "
            f"{num_database:,} of {benchmark.name}: its index holds something else, or part of them."
        )


def _ask_for_retrieval(benchmark: RetrievalBenchmark, options: UrlOptions) -> _Judged:
    file = _required(options.solution, "--solution", benchmark)
    solution = read_retrieval_solution(file)
    with ShardSet.open(_required(options.shards, "--shards", benchmark)) as shard_set:
        all_rows = shard_set.rows(benchmark.query_split)
        names = [shard_set.key(row).rpartition("/")[2] for row in all_rows]
        scored = [place for place, name in enumerate(names) if name in solution.usages]
        queries = _queries_of(shard_set, all_rows[scored])
        served = _gallery_of(shard_set, benchmark.gallery_split, options)
        rankings = _ask_within(served, options, queries, k=MAX_IMAGES)
        predictions = {
            names[place]: [shard_set.key(row).rpartition("/")[2] for row in answer]
            for place, answer in zip(scored, rankings.answers, strict=True)
        }
    sections = retrieval_sections(score_retrieval(predictions, solution), {})
    return _Judged(sections, _Asked.of(rankings), RETRIEVAL_PROTOCOL, file_sha256(file))


def _ask(
    options: UrlOptions,
    queries: Sequence[PictureQuery],
    keep: Callable[[tuple[Hit, ...]], ndarray],
    *,
    k: int,
) -> ServerRankings[ndarray]:
    return ask_server(
        options.url,
        queries,
        keep,
        k=k,
        exact=options.is_exact,
        num_connections=options.num_connections,
        api_key=options.api_key,
    )


def _ask_within(
    served: ServedGallery, options: UrlOptions, queries: Sequence[PictureQuery], *, k: int
) -> ServerRankings[ndarray]:
    """Asks for so many more hits that k remain without strangers, as far as the server gives them."""
    rankings = _ask(options, queries, served, k=k + len(served.strangers))
    answers = [answer[:k] for answer in rankings.answers]
    info = replace(rankings.info, num_vectors=int(served.is_gallery.sum()))  # what the numbers are about
    return replace(rankings, info=info, answers=answers, warnings=(*served.warnings, *rankings.warnings))


def _gallery_of(shard_set: ShardSet, split: str | None, options: UrlOptions) -> ServedGallery:
    items = served_items(options.url, api_key=options.api_key)
    return ServedGallery.of(items, shard_set, split, options.url)


def _padded(answers: Sequence[Int64[ndarray, "_"]]) -> Int64[ndarray, "queries depth"]:
    """One row per query, -1 where a list is shorter."""
    rows = np.full((len(answers), max(map(len, answers), default=0)), -1, np.int64)
    for query, answer in enumerate(answers):
        rows[query, : len(answer)] = answer
    return rows


def _queries_of(shard_set: ShardSet, rows: Int64[ndarray, "queries"]) -> list[PictureQuery]:
    return [PictureQuery(shard_set.key(row), partial(shard_set.read_bytes, int(row))) for row in rows]


def _required(path: Path | None, option: str, benchmark: Benchmark) -> Path:
    if path is None:
        raise SettingsError(f"{benchmark.name} needs {option}.")
    return path


def _difference_to_offline(offline: Path, live: Result) -> list[str]:
    lines = []
    for section, metrics in compare_results(open_result(offline), live).items():
        for name, difference in metrics.items():
            lines.append(f"live minus offline, {section} {name}: {difference.difference:+.2f}")
    return [*lines, *remarks(open_result(offline), live)]
