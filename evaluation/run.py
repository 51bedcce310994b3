"""An encoder and shards -> embeddings -> the numbers of a benchmark: what `lookalike evaluate run` does."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from evaluation.benchmarks import Benchmark, ClassBenchmark, ClassProtocol, LandmarkBenchmark, RetrievalBenchmark
from evaluation.classes.given_rankings import judge_rankings, recall_against_exact, without_query
from evaluation.classes.pictures import have_company
from evaluation.classes.protocols import leave_one_out, query_gallery, random_gallery
from evaluation.galleries import Illustrations, ShardShelf, Shelf, ShelfBehind
from evaluation.gldv2.retrieval import score_retrieval
from evaluation.gldv2.solutions import read_retrieval_solution
from evaluation.gldv2.submissions import MAX_IMAGES, write_retrieval_submission
from evaluation.outputs import Outputs, Shown, conclude
from evaluation.pictures_of_shards import class_pictures, landmark_pictures
from evaluation.protocols import (
    CROP,
    LANDMARK_PROTOCOL,
    NO_CROP,
    RETRIEVAL_PROTOCOL,
    class_protocol,
    places_in_truth,
    require_official_size,
    retrieval_sections,
)
from evaluation.record import Role, record_of_embeddings
from evaluation.result import CurvePoint, Result, Section
from evaluation.revisited.evaluate import evaluate_descriptors
from evaluation.revisited.ground_truth import load_ground_truth
from evaluation.revisited.nearest import nearest
from evaluation.revisited.pictures import rows_in_shards
from evaluation.revisited.rank_counts import TieRule
from evaluation.revisited.rankings import evaluate_rankings
from evaluation.validators import landmark_overlap, missing_pictures, norms, training_overlap
from evaluation.vector_files import load_vector_parts, load_vectors
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.published_index import PublishedIndex
from lookalike.artifacts import Manifest, file_sha256, fingerprint, require_parent
from lookalike.encoder import Encoder, create_pretrained_encoder, load_encoder
from lookalike.errors import ArtifactError, DataError, SettingsError
from lookalike.exact_search import exact_search
from lookalike.records import SearchHits, SearchParameters
from lookalike.world import World

_NUM_COMPARED = 100  # nearest neighbours by which an index is compared with exact search
_QUERIES_AT_A_TIME = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a benchmark is run with, beside the encoder and the shards."""

    out: Path  # folder; embeddings are kept there, and a rerun goes on from them
    ties: TieRule = "index"
    index: Path | None = None  # ranks by this published index, not by brute force
    depth: int = 10_000  # hits asked of an index at most
    ground_truth: Path | None = None  # of Oxford and Paris
    distractors: Path | None = None  # shard set of pictures that are relevant to nobody
    solution: Path | None = None  # of Google Landmarks
    training_shards: Path | None = None  # to warn of what was learned from


@dataclass(frozen=True)
class Judged:
    """The numbers of one benchmark, what they rest on, and how to show them."""

    sections: Mapping[str, Section]
    protocol: str
    ground_truth: str  # checksum or fingerprint
    crop: str = NO_CROP
    curve: Sequence[CurvePoint] = ()
    warnings: Sequence[str] = ()
    expected: Mapping[Role, int] = field(default_factory=dict)
    distractors: EmbeddingSet | None = None
    search: SearchParameters | None = None  # how an index was asked
    pictures: Callable[[], Illustrations] = Illustrations


@dataclass(frozen=True)
class Embedded:
    """The pictures of one split with their vectors, by sample id."""

    embeddings: EmbeddingSet
    ids: Int64[ndarray, "pictures"]  # ascending
    vectors: Float[ndarray, "pictures dim"]  # memory-mapped where possible
    labels: Int64[ndarray, "pictures"]
    names: list[str]

    def only(self, kept: Bool[ndarray, "pictures"]) -> "Embedded":
        names = [name for name, is_kept in zip(self.names, kept, strict=True) if is_kept]
        return Embedded(self.embeddings, self.ids[kept], self.vectors[kept], self.labels[kept], names)

    def take(self, ids: Int64[ndarray, "chosen"], *, what: str) -> Float[ndarray, "chosen dim"]:
        """Vectors of some ids; raises DataError where pictures have none."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        is_missing = self.ids[places] != ids
        if is_missing.any():
            raise DataError(
                f"{int(is_missing.sum())} {what} have no vector, first id {int(ids[is_missing][0])}; "
                f"{self.embeddings.folder} lists why. The protocol needs every one of them."
            )
        return self.vectors[places]


def evaluate_run(
    benchmark: Benchmark,
    encoder: Encoder,
    shard_set: ShardSet,
    options: RunOptions,
    outputs: Outputs,
    *,
    world: World = World(),
) -> tuple[dict[str, Any], list[str]]:
    """Embeds what the benchmark needs and judges it. All ranks work, the first one writes and returns the numbers.

    Raises:
        SettingsError: the benchmark needs an option that is missing, or has no use for one.
        DataError, ArtifactError: shards, ground truth or index do not fit.
    """
    _require_options(benchmark, options)
    _require_own_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    outputs.check()
    gallery = _embed(encoder, shard_set, benchmark.gallery_split, options, world)
    queries = _embed(encoder, shard_set, benchmark.query_split, options, world) if benchmark.query_split else None
    index = _open_index(options.index, shard_set, gallery) if options.index else None
    judge = _Judge(encoder, shard_set, gallery, queries or gallery, index, options, world)
    match benchmark:
        case ClassBenchmark():
            judged = judge.classes(benchmark)
        case LandmarkBenchmark():
            judged = judge.landmarks(benchmark)
        case RetrievalBenchmark():
            judged = judge.retrieval()
    if not world.is_first:
        return {}, []
    result = _result(benchmark, judge, judged, has_queries=queries is not None)
    shown = Shown(judged.pictures, {"shards": shard_set.fingerprint, "encoder": encoder.fingerprint})
    return conclude(
        result,
        outputs,
        name=f"encoder {encoder.fingerprint[:8]}",
        title=f"Retrieval quality: {benchmark.name}",
        shown=shown,
    )


@dataclass(frozen=True)
class _Judge:
    """Embedded pictures and whatever ranks them."""

    encoder: Encoder
    shard_set: ShardSet
    gallery: Embedded
    queries: Embedded  # the gallery itself where the benchmark has no others
    index: PublishedIndex | None
    options: RunOptions
    world: World

    def classes(self, benchmark: ClassBenchmark) -> Judged:
        sections: dict[str, Section] = {}
        warnings: list[str] = []
        search = None
        for protocol in benchmark.protocols:
            if self.index is None:
                sections[protocol] = self._exact_section(benchmark, protocol)
            elif protocol == "random_gallery":
                warnings.append("random_gallery was left out: its galleries are parts of what the index holds.")
            else:
                sections[protocol], search = self._section_by_index(self.index, benchmark)
        if self.options.training_shards:
            with ShardSet.open(self.options.training_shards) as training:
                warnings += training_overlap(
                    training,
                    self.shard_set,
                    training_split="train" if "train" in training.splits else None,
                    split=benchmark.gallery_split,
                )
        return Judged(
            sections,
            protocol=class_protocol(list(sections), benchmark),
            ground_truth=fingerprint([self.shard_set.fingerprint, benchmark.gallery_split, benchmark.query_split]),
            warnings=warnings,
            search=search,
            pictures=lambda: class_pictures(
                *next(iter(sections.items())),
                self.shard_set,
                self.queries,
                self.gallery,
                nearest=self._nearest_of,
            ),
        )

    def _exact_section(self, benchmark: ClassBenchmark, protocol: ClassProtocol) -> Section:
        gallery, queries = self.gallery, self.queries
        if protocol == "query_gallery":
            return query_gallery(
                queries.vectors,
                queries.ids,
                queries.labels,
                gallery.vectors,
                gallery.ids,
                gallery.labels,
                ks=benchmark.ks,
                ties=self.options.ties,
                names=queries.names,
                world=self.world,
            )
        judge = leave_one_out if protocol == "leave_one_out" else random_gallery
        return judge(
            gallery.vectors,
            gallery.ids,
            gallery.labels,
            ks=benchmark.ks,
            ties=self.options.ties,
            names=gallery.names,
            world=self.world,
        )

    def _section_by_index(self, index: PublishedIndex, benchmark: ClassBenchmark) -> tuple[Section, SearchParameters]:
        queries = self.queries if benchmark.query_split else self.queries.only(have_company(self.queries.labels))
        largest_class = int(np.unique(self.gallery.labels, return_counts=True)[1].max())
        # One more, since the query itself may be among the hits.
        depth = 1 + max(*benchmark.ks, min(largest_class, self.options.depth))
        search = SearchParameters(k=min(depth, index.num_vectors))
        hits = index.search(_float32(queries.vectors), search)
        section = judge_rankings(
            hits.ids,
            queries.ids,
            queries.labels,
            self.gallery.ids,
            self.gallery.labels,
            ks=benchmark.ks,
            names=queries.names,
        )
        recall = self._recall_of(without_query(hits, queries.ids), queries.vectors, excluded_ids=queries.ids)
        return replace(section, facts={**section.facts, **recall}), search

    def _nearest_of(self, places: Int64[ndarray, "chosen"], k: int) -> SearchHits:
        """The ranking that was judged, of some queries, each without itself."""
        vectors, ids = _float32(self.queries.vectors[places]), self.queries.ids[places]
        if self.index is None:
            return exact_search(vectors, self.gallery.vectors, self.gallery.ids, k=k, excluded_ids=ids)
        hits = self.index.search(vectors, SearchParameters(k=min(k + 1, self.index.num_vectors)))
        return without_query(hits, ids)

    def landmarks(self, benchmark: LandmarkBenchmark) -> Judged:
        assert self.options.ground_truth is not None
        truth = load_ground_truth(self.options.ground_truth)
        require_official_size(truth, benchmark, self.options.ground_truth)
        rows = rows_in_shards(truth.database_names, self.shard_set, split=benchmark.gallery_split)
        database = self.gallery.take(rows, what="database pictures")
        query_rows = rows_in_shards(truth.query_names, self.shard_set, split=benchmark.query_split)
        queries = self.queries.take(query_rows, what="queries")
        distractors = self._distractors()
        parts = load_vector_parts(distractors.folder) if distractors else []
        search, judged_hits = None, None
        if self.index is None:
            outcome = evaluate_descriptors(
                queries,
                database,
                truth,
                distractors=parts,
                ties=self.options.ties,
                progress_file=self.options.out / "distractors.progress.npz",
                world=self.world,
            )
            sections: dict[str, Section] = {str(name): section for name, section in outcome.sections.items()}
        else:
            search = SearchParameters(k=min(self.options.depth, self.index.num_vectors))
            hits = self.index.search(_float32(queries), search)
            places = places_in_truth(hits.ids, rows, num_database=len(truth.database_names))
            outcome = evaluate_rankings(places, truth, num_distractors=self.index.num_vectors - len(rows))
            recall = self._recall_of(hits, queries)
            judged_hits = SearchHits(places, hits.scores)
            sections = {
                name: replace(section, facts={**section.facts, **recall}) for name, section in outcome.sections.items()
            }

        def pictures() -> Illustrations:
            shown = judged_hits or nearest(queries, database, parts, k=_NUM_COMPARED)
            shelf: Shelf = ShardShelf(self.shard_set, rows)
            query_shelf = ShardShelf(self.shard_set, query_rows)
            if distractors is None or self.options.distractors is None:
                return landmark_pictures(sections, truth, shown, gallery_shelf=shelf, query_shelf=query_shelf)
            with ShardSet.open(self.options.distractors) as shards:
                behind = ShelfBehind(shelf, len(rows), ShardShelf(shards, np.sort(distractors.ids)))
                return landmark_pictures(sections, truth, shown, gallery_shelf=behind, query_shelf=query_shelf)

        names = {name.rpartition("_")[0] for name in truth.database_names}
        return Judged(
            sections,
            protocol=LANDMARK_PROTOCOL,
            ground_truth=truth.sha256,
            crop=CROP,
            curve=outcome.curve,
            expected={"queries": len(truth.query_names), "gallery": benchmark.num_database},
            distractors=distractors,
            search=search,
            warnings=self._learned_landmarks(names),
            pictures=pictures,
        )

    def _learned_landmarks(self, names: set[str]) -> list[str]:
        if self.options.training_shards is None:
            return []
        with ShardSet.open(self.options.training_shards) as training:
            return landmark_overlap(training.class_names, names)

    def retrieval(self) -> Judged:
        names = np.array([name.rpartition("/")[2] for name in self.queries.names])
        image_names = np.array([name.rpartition("/")[2] for name in self.gallery.names])
        solution = read_retrieval_solution(self.options.solution) if self.options.solution else None
        asked = np.isin(names, list(solution.usages)) if solution else np.ones(len(names), bool)
        vectors = self.queries.vectors[asked]
        search = None
        if self.index:
            search = SearchParameters(k=min(MAX_IMAGES, self.index.num_vectors))
            hits = self.index.search(_float32(vectors), search)
        else:
            hits = self._exact_hits(vectors, k=MAX_IMAGES)
        places = np.searchsorted(self.gallery.ids, hits.ids)
        rankings = {
            str(name): [str(image_names[place]) for place, id in zip(row, ids, strict=True) if id >= 0]
            for name, row, ids in zip(names[asked], places, hits.ids, strict=True)
        }
        submission = self.options.out / "submission.csv"
        if self.world.is_first:
            try:
                write_retrieval_submission(submission, rankings)
            except ValueError as error:
                raise DataError(f"no official submission can be written of these shards: {error}.") from error
            logger.info("submission: %s", submission)
        if solution is None:
            raise SettingsError(
                f"{submission} is written; to score it give --solution with the official retrieval_solution_v2.1.csv."
            )
        scores = score_retrieval(rankings, solution)
        recall = self._recall_of(hits, vectors) if self.index else {}
        return Judged(
            retrieval_sections(scores, recall),
            protocol=RETRIEVAL_PROTOCOL,
            ground_truth=file_sha256(self.options.solution) if self.options.solution else "",
            search=search,
        )

    def _distractors(self) -> EmbeddingSet | None:
        if self.options.distractors is None:
            return None
        with ShardSet.open(self.options.distractors) as shards:
            folder = self.options.out / "embeddings" / "distractors"
            return embed_shards(self.encoder, shards, folder, world=self.world)

    def _exact_hits(
        self, vectors: ndarray, *, k: int, excluded_ids: Int64[ndarray, "queries"] | None = None
    ) -> SearchHits:
        own, gallery = _float32(vectors), self.gallery
        parts = [slice(start, start + _QUERIES_AT_A_TIME) for start in range(0, len(own), _QUERIES_AT_A_TIME)]
        blocks = [
            exact_search(
                own[part],
                gallery.vectors,
                gallery.ids,
                k=k,
                excluded_ids=None if excluded_ids is None else excluded_ids[part],
            )
            for part in parts
        ]
        return SearchHits(*(np.concatenate([getattr(block, name) for block in blocks]) for name in ("ids", "scores")))

    def _recall_of(
        self, hits: SearchHits, vectors: ndarray, *, excluded_ids: Int64[ndarray, "queries"] | None = None
    ) -> dict[str, Any]:
        """How much of the truth of exact search an index shows, beside what it does to the benchmark's numbers."""
        k = min(_NUM_COMPARED, hits.ids.shape[1])
        exact = self._exact_hits(vectors, k=k, excluded_ids=excluded_ids)
        return {f"recall_of_index_at_{k}": 100 * recall_against_exact(hits.ids, exact.ids)}


def open_encoder(checkpoint: Path | None, pretrained: str | None, *, image_size: int) -> Encoder:
    """The encoder of a training run, of one of its checkpoints, or in a folder of its own; or a pretrained one.

    Raises:
        ArtifactError: there is no finished encoder.
    """
    if checkpoint is None:
        return create_pretrained_encoder(str(pretrained), image_size=image_size)
    inside = checkpoint / "encoder"
    return load_encoder(inside if inside.is_dir() else checkpoint)


def _require_options(benchmark: Benchmark, options: RunOptions) -> None:
    is_landmark, is_retrieval = isinstance(benchmark, LandmarkBenchmark), isinstance(benchmark, RetrievalBenchmark)
    if is_landmark and options.ground_truth is None:
        raise SettingsError(f"{benchmark.name} needs --ground-truth, its official gnd_{benchmark.name}.pkl.")
    for option, value, is_used in (
        ("--ground-truth", options.ground_truth, is_landmark),
        ("--distractors", options.distractors, is_landmark and options.index is None),
        ("--solution", options.solution, is_retrieval),
        ("--training-shards", options.training_shards, not is_retrieval),
    ):
        if value is not None and not is_used:
            with_index = " with --index" if options.index and is_landmark else ""
            raise SettingsError(f"{benchmark.name}{with_index} has no use for {option}.")


def _require_own_folder(folder: Path) -> None:
    """Raises ArtifactError where a folder holds something that no run has left there."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "embeddings").is_dir():
        raise ArtifactError(f"{folder} holds something other than a run of a benchmark. Choose another folder.")


def _embed(encoder: Encoder, shard_set: ShardSet, split: str | None, options: RunOptions, world: World) -> Embedded:
    folder = options.out / "embeddings" / (split or "all")
    embeddings = embed_shards(encoder, shard_set, folder, split=split, world=world)
    ids = np.sort(embeddings.ids)
    keys = shard_set.samples["key"].take(ids).to_pylist()
    return Embedded(embeddings, ids, load_vectors(folder), shard_set.labels[ids], keys)


def _open_index(folder: Path, shard_set: ShardSet, gallery: Embedded) -> PublishedIndex:
    index = PublishedIndex.open(folder)
    require_parent(index.folder, index.manifest, "shards", found=shard_set.fingerprint, parent=shard_set.folder)
    # So the index holds the gallery and nothing else, under the encoder at hand.
    embeddings = gallery.embeddings
    require_parent(index.folder, index.manifest, "embeddings", found=embeddings.fingerprint, parent=embeddings.folder)
    return index


def _result(benchmark: Benchmark, judge: _Judge, judged: Judged, *, has_queries: bool) -> Result:
    manifests: dict[Role, Manifest] = {"gallery": judge.gallery.embeddings.manifest}
    if has_queries:
        manifests["queries"] = judge.queries.embeddings.manifest
    if judged.distractors:
        manifests["distractors"] = judged.distractors.manifest
    record = record_of_embeddings(
        benchmark.name,
        judged.protocol,
        manifests,
        judge.encoder.settings,
        ground_truth=judged.ground_truth,
        ties="as the index orders them" if judge.index else judge.options.ties,
        crop=judged.crop,
        expected=judged.expected,
        index=judge.index.manifest if judge.index else None,
        search=judged.search,
    )
    warnings = [*judged.warnings, *norms("gallery", judge.gallery.vectors), *missing_pictures(record.counts)]
    return Result(benchmark.name, judged.sections, record.as_json(), warnings, judged.curve)


def _float32(vectors: Float[ndarray, "rows dim"]) -> Float32[ndarray, "rows dim"]:
    return np.ascontiguousarray(vectors, dtype=np.float32)
