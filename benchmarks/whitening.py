"""Whitening on real embeddings: what it gains in mAP, and what dimension reduction then costs.

    python benchmarks/whitening.py            # minutes on two cores, prints a table
    python benchmarks/whitening.py --save     # and writes it to benchmarks/results/whitening_cpu.md

The pictures, the frozen encoder, queries and relevance are those of `benchmarks/rerank.py`. A whitening is fitted to
the training split, the learned one to its classes, and judged on the test split, whose classes it never saw.
"""

import argparse
import sys
import time
from pathlib import Path

from lookalike.native_libraries import set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np
import torch
from frozen_backbone import IMAGE_SIZE, PICTURE_SIZE, footer
from numpy import ndarray
from rerank import Quality, first_queries, folds_of, judge

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from demo.emoji_pictures import fetch_vendor_packages, render_pictures
from evaluation.bootstrap import bootstrap_mean
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.whiten import whitened_encoder
from lookalike.encoder import create_pretrained_encoder
from lookalike.encoder_settings import WhiteningSettings
from lookalike.native_libraries import load_torch, num_cores
from lookalike.whitening import Whitening

RESULT = Path(__file__).parent / "results" / "whitening_cpu.md"
CANDIDATES = (
    *(WhiteningSettings(dim=dim, power=power) for dim in (None, 512, 128, 32) for power in (0.5, 0.25)),
    WhiteningSettings(dim=512, shrinkage=0.1),
    *(
        WhiteningSettings(method="learned", dim=dim, shrinkage=shrinkage)
        for dim in (None, 512, 128, 32)
        for shrinkage in (0.0, 0.1, 0.5)
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="where pictures and shards are, or go")
    parser.add_argument("--queries", type=int, default=1200, help="of the test split, spread over vendors and classes")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.parent.name}/{RESULT.name} too")
    arguments = parser.parse_args()
    load_torch(num_threads=1)
    started = time.perf_counter()
    lines = report(arguments.folder, num_queries=arguments.queries)
    lines += ["", *footer(time.perf_counter() - started, threads=1)]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(folder: Path, *, num_queries: int) -> list[str]:
    with write_emoji(folder) as shards:
        encoder = create_pretrained_encoder("lite0", image_size=IMAGE_SIZE)
        train, test = (
            embed_shards(encoder, shards, folder / "embeddings" / f"frozen_{IMAGE_SIZE}_{split}", split=split)
            for split in ("train", "test")
        )
        plain, labels = judged(test, shards, None, num_queries=num_queries)
        rows = [
            f"| none | {test.dim} | | | {100 * plain.average_precision.mean():.2f} | | "
            f"{100 * plain.hit_at_1.mean():.2f} | |"
        ]
        for settings in CANDIDATES:
            before = time.process_time()
            whitening = whitened_encoder(train, settings).whitening
            seconds = time.process_time() - before
            assert whitening is not None
            quality, _ = judged(test, shards, whitening, num_queries=num_queries)
            gain = bootstrap_mean(100 * (quality.average_precision - plain.average_precision), labels)
            rows.append(
                f"| {settings.method} | {whitening.dim} | {settings.power:g} | {settings.shrinkage:g} | "
                f"{100 * quality.average_precision.mean():.2f} | "
                f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f}) | {100 * quality.hit_at_1.mean():.2f} | "
                f"{seconds:.1f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
        return [
            f"# Whitening: emoji of one vendor search those of the others, frozen encoder, {len(labels):,} queries",
            "",
            "| method | dim | power | shrinkage | mAP, % | gain and its 95% interval | hit_rate@1, % | CPU s to fit |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Fitted to {len(train.ids):,} pictures of other classes; judged as in rerank_cpu.md, intervals "
            "bootstrapped by class.",
        ]


def write_emoji(folder: Path) -> ShardSet:
    packages = fetch_vendor_packages(folder / "packages")
    render_pictures(packages, folder / "pictures", PICTURE_SIZE, num_processes=num_cores())
    source = ClassFolders(ClassFoldersSettings(folder=folder / "pictures"))
    return write_shards(source, folder / "shards", ShardSettings(), num_processes=num_cores())


def judged(
    embeddings: EmbeddingSet, shards: ShardSet, whitening: Whitening | None, *, num_queries: int
) -> tuple[Quality, ndarray]:
    """The quality of each query, and its class."""
    vectors = embeddings.vectors()
    if whitening is not None:
        vectors = whitening(torch.from_numpy(vectors)).numpy()
    folds = list(folds_of(vectors, embeddings.ids, shards))
    folds = [first_queries(fold, num_queries // len(folds)) for fold in folds]
    return judge(folds, None), np.concatenate([fold.labels for fold in folds])


if __name__ == "__main__":
    main()
