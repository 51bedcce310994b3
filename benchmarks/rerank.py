"""Re-ranking on real embeddings: what each method gains in mAP, and what a query costs.

    python benchmarks/rerank.py            # minutes on two cores, prints a table
    python benchmarks/rerank.py --save     # and writes it to benchmarks/results/rerank_cpu.md

The pictures are the demo's emoji, one class per thing drawn, embedded by the frozen pretrained encoder. Each vendor's
drawings in turn search those of all other vendors; relevant are the same things. Every method is measured
with its default settings, with the values of its paper, and as it did best on the classes of the training split, whose
pictures are not measured on; a row that would be there twice is left out.
One thread computes.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lookalike.native_libraries import set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np
from frozen_backbone import IMAGE_SIZE, PICTURE_SIZE, footer
from numpy import ndarray

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from demo.emoji_pictures import fetch_vendor_packages, render_pictures
from evaluation.bootstrap import bootstrap_mean
from indexing.embed import embed_shards
from indexing.reranking.registry import search_and_rerank
from indexing.reranking.settings import (
    AlphaQueryExpansion,
    AverageQueryExpansion,
    DatabaseAugmentation,
    Diffusion,
    KReciprocal,
    RerankSettings,
)
from indexing.searching.exact import ExactSearcher
from indexing.vector_store import VectorStore
from lookalike.encoder import create_pretrained_encoder
from lookalike.native_libraries import load_torch, num_cores
from lookalike.records import SearchHits, SearchParameters
from lookalike.settings import Settings

RESULT = Path(__file__).parent / "results" / "rerank_cpu.md"
K = 10  # hits of the queries whose cost is measured
QUERIES_AT_A_TIME = 128
DEPTH = 100  # first hits that average precision looks at
NUM_TUNED_QUERIES = 300
LARGE_GALLERY = (100_000, 512)
# Of each method its defaults, the values of its paper, and others.
CANDIDATES: dict[str, Sequence[RerankSettings]] = {
    "average query expansion": [
        AverageQueryExpansion(),
        AverageQueryExpansion(num_neighbours=10),
        *(AverageQueryExpansion(num_neighbours=n) for n in (1, 2, 3, 5)),
    ],
    "alpha query expansion": [
        AlphaQueryExpansion(),
        AlphaQueryExpansion(num_neighbours=50, alpha=3),
        *(AlphaQueryExpansion(num_neighbours=n, alpha=a) for n in (3, 10, 50) for a in (3.0, 10.0, 20.0)),
    ],
    "database augmentation": [
        DatabaseAugmentation(),
        DatabaseAugmentation(num_neighbours=20),
        *(DatabaseAugmentation(num_neighbours=n) for n in (1, 2, 3, 5)),
    ],
    "k-reciprocal": [
        KReciprocal(),
        KReciprocal(num_neighbours=20, num_averaged=6, cosine_share=0.3),
        *(
            KReciprocal(num_neighbours=k, num_averaged=a, cosine_share=share)
            for k, a in ((3, 2), (5, 2), (8, 3))
            for share in (0.3, 0.6)
        ),
    ],
    "diffusion": [
        Diffusion(),
        Diffusion(num_neighbours=50, num_seeds=10, alpha=0.99, gamma=3),
        *(
            Diffusion(num_neighbours=k, num_seeds=s, alpha=alpha, gamma=gamma)
            for k, s in ((5, 3), (10, 5))
            for alpha, gamma in ((0.99, 3.0), (0.9, 10.0), (0.8, 20.0))
        ),
    ],
}


@dataclass(frozen=True)
class Fold:
    """One vendor's drawings, which search those of all others."""

    queries: ndarray  # [queries, dim], float32 of unit length
    labels: ndarray  # [queries]
    gallery: ExactSearcher
    label_of_row: ndarray  # [gallery]; ids are rows
    num_relevant: ndarray  # [queries], at least 1


@dataclass(frozen=True)
class Quality:
    """Per query."""

    average_precision: ndarray
    hit_at_1: ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="where pictures and shards are, or go")
    parser.add_argument("--queries", type=int, default=1200, help="of the test split, spread over vendors and classes")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.parent.name}/{RESULT.name} too")
    arguments = parser.parse_args()
    load_torch(num_threads=1)
    started = time.perf_counter()
    tuning, measured = embed_emoji(arguments.folder)
    measured = [first_queries(fold, arguments.queries // len(measured)) for fold in measured]
    tuning = [first_queries(fold, min(NUM_TUNED_QUERIES, arguments.queries) // len(tuning)) for fold in tuning]
    lines = report(tuning, measured)
    lines += ["", *footer(time.perf_counter() - started, threads=1)]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def embed_emoji(folder: Path) -> tuple[list[Fold], list[Fold]]:
    """Folds of the training split and of the test split; what is there already is not made again."""
    packages = fetch_vendor_packages(folder / "packages")
    render_pictures(packages, folder / "pictures", PICTURE_SIZE, num_processes=num_cores())
    source = ClassFolders(ClassFoldersSettings(folder=folder / "pictures"))
    encoder = create_pretrained_encoder("lite0", image_size=IMAGE_SIZE)
    with write_shards(source, folder / "shards", ShardSettings(), num_processes=num_cores()) as shards:
        folds = []
        for split in ("train", "test"):
            name = f"frozen_{IMAGE_SIZE}_{split}"
            embeddings = embed_shards(encoder, shards, folder / "embeddings" / name, split=split)
            folds.append(list(folds_of(embeddings.vectors(), embeddings.ids, shards)))
    return folds[0], folds[1]


def folds_of(vectors: ndarray, ids: ndarray, shards: ShardSet) -> Iterator[Fold]:
    labels = shards.labels[ids]
    vendors = np.array([shards.key(id).rpartition("/")[2] for id in ids])
    for vendor in np.unique(vendors):
        is_query = vendors == vendor
        gallery_labels = labels[~is_query]
        store = VectorStore.of(vectors[~is_query], np.arange(len(gallery_labels)))
        num_relevant = np.array([(gallery_labels == label).sum() for label in labels[is_query]])
        assert (num_relevant > 0).all()
        yield Fold(vectors[is_query], labels[is_query], ExactSearcher(store), gallery_labels, num_relevant)


def first_queries(fold: Fold, count: int) -> Fold:
    """Spread over all classes."""
    rows = np.unique(np.linspace(0, len(fold.queries) - 1, count).astype(int))
    return Fold(fold.queries[rows], fold.labels[rows], fold.gallery, fold.label_of_row, fold.num_relevant[rows])


def report(tuning: Sequence[Fold], measured: Sequence[Fold]) -> list[str]:
    large = large_fold(dim=LARGE_GALLERY[1])
    plain = judge(measured, None)
    clusters = np.concatenate([fold.labels for fold in measured])
    small_ms, large_ms = cost_ms(measured[0], None), cost_ms(large, None)
    num_queries = sum(len(fold.queries) for fold in measured)
    sizes = [fold.gallery.num_vectors for fold in measured]
    rows = [
        f"| none | | {100 * plain.average_precision.mean():.2f} | | {100 * plain.hit_at_1.mean():.2f} | "
        f"{small_ms:.2f} | {large_ms:.1f} |"
    ]
    for name, candidates in CANDIDATES.items():
        tried = [judge(tuning, settings).average_precision.mean() for settings in candidates]
        best = candidates[int(np.argmax(tried))]
        shown = {"default": candidates[0], "paper": candidates[1], "best on train": best}
        for label, settings in shown.items():
            if label == "best on train" and settings in candidates[:2]:
                continue
            quality = judge(measured, settings)
            gain = bootstrap_mean(100 * (quality.average_precision - plain.average_precision), clusters)
            rows.append(
                f"| {name} | {label}: {numbers_of(settings)} | "
                f"{100 * quality.average_precision.mean():.2f} | "
                f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f}) | {100 * quality.hit_at_1.mean():.2f} | "
                f"{cost_ms(measured[0], settings):.2f} | {cost_ms(large, settings):.1f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return [
        f"# Re-ranking: emoji of one vendor search those of the others, frozen encoder, {num_queries:,} queries",
        "",
        "| method | settings | mAP, % | gain and its 95% interval | hit_rate@1, % | "
        f"CPU ms, {sizes[0]:,} x {measured[0].gallery.dim} | CPU ms, {LARGE_GALLERY[0]:,} x {LARGE_GALLERY[1]} |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"mAP is over the first {DEPTH} of galleries of {min(sizes):,} to {max(sizes):,} pictures, "
        f"{np.concatenate([fold.num_relevant for fold in measured]).mean():.1f} of them relevant on average; intervals "
        "are bootstrapped by class.",
        f"CPU ms are of one query at a time with k = {K} on one thread, its exact searches included; the large gallery "
        "is synthetic.",
    ]


def judge(folds: Sequence[Fold], settings: RerankSettings | None) -> Quality:
    """By the first hits; relevant pictures that are not among them count as never found."""
    precisions, hits_at_1 = [], []
    for fold in folds:
        parameters = SearchParameters(k=DEPTH, exact=True)
        for start in range(0, len(fold.queries), QUERIES_AT_A_TIME):
            part = slice(start, start + QUERIES_AT_A_TIME)
            ids = answer(fold.gallery, fold.queries[part], parameters, settings).ids
            is_relevant = fold.label_of_row[ids] == fold.labels[part, None]
            precision = is_relevant.cumsum(axis=1) / np.arange(1, ids.shape[1] + 1)
            precisions.append((precision * is_relevant).sum(axis=1) / fold.num_relevant[part])
            hits_at_1.append(is_relevant[:, 0].astype(float))
    return Quality(np.concatenate(precisions), np.concatenate(hits_at_1))


def answer(
    searcher: ExactSearcher, queries: ndarray, parameters: SearchParameters, settings: RerankSettings | None
) -> SearchHits:
    if settings is None:
        return searcher.search(queries, parameters)
    return search_and_rerank(searcher, queries, parameters, settings)


def cost_ms(fold: Fold, settings: RerankSettings | None, *, num_queries: int = 24) -> float:
    """Median over queries, of which the first few are not counted."""
    spent = []
    for query in first_queries(fold, num_queries).queries:
        before = time.process_time()
        answer(fold.gallery, query[None], SearchParameters(k=K, exact=True), settings)
        spent.append(1000 * (time.process_time() - before))
    return float(np.median(spent[num_queries // 8 :]))


def large_fold(*, dim: int) -> Fold:
    """Clusters of 20; only for its size."""
    generator = np.random.default_rng(0)
    labels = np.arange(LARGE_GALLERY[0]) // 20
    vectors = generator.standard_normal((LARGE_GALLERY[0], dim), dtype=np.float32)
    vectors += 2 * generator.standard_normal((labels[-1] + 1, dim), dtype=np.float32)[labels]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = VectorStore.of(vectors, np.arange(len(vectors)))
    return Fold(vectors[::20], labels[::20], ExactSearcher(store), labels, np.full(len(vectors) // 20, 20))


def numbers_of(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.model_dump(exclude={"name"}).items())


if __name__ == "__main__":
    main()
