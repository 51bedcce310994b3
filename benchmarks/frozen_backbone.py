"""What `cold_start.py` and `ablation.py` share: the demo's emoji behind a frozen backbone, and training what follows.

EfficientNet-Lite0 stays as ImageNet left it and embeds every picture once, unchanged and in some augmented versions.
Trained is an untrained projection alone: a step at batch 1024 takes a hundredth of a second or so, and two cores manage
many runs. Loss, class-balanced batches, course of the learning rate and measured numbers are the training loop's own.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.decode import CroppablePicture, decode_image
from data_pipelines.settings import AugmentationSettings, ClassFoldersSettings, ShardSettings
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from data_pipelines.transforms import EvaluationTransform, TrainingTransform
from demo.emoji_pictures import fetch_vendor_packages, render_pictures
from lookalike.encoder import Encoder, create_encoder, create_pretrained_encoder, embed_pixels
from lookalike.native_libraries import load_torch, num_cores
from lookalike.world import World
from training.batch_metrics import neighbour_counts
from training.distributed_loss import score_across_ranks
from training.gradient_health import measure_batch
from training.loss_registry import create_loss
from training.loss_settings import LossSettings
from training.optimizer import schedule_factor, set_learning_rate
from training.optimizer_settings import AdamWSettings

IMAGE_SIZE = 64
PICTURE_SIZE = 96
IMAGES_PER_CLASS = 4
NUM_VERSIONS = 8
# The demo's recipe, whose crops and colours were measured best.
AUGMENTATION = AugmentationSettings(
    crop_scale=(0.7, 1.0),
    flip_probability=0.0,
    rotation_degrees=10,
    hue=0.05,
    saturation=0.3,
    brightness=0.1,
    contrast=0.1,
    grayscale_probability=0.05,
)
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Features:
    """What the frozen backbone says of every picture; unit-length rows."""

    train: Float[Tensor, "versions pictures features"]  # augmented
    train_labels: Int64[ndarray, "pictures"]
    test: Float[Tensor, "test_pictures features"]  # as they are; classes that training never sees
    test_labels: Int64[Tensor, "test_pictures"]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run measured."""

    hit_rate_at_1: float  # of the unseen classes, leave-one-out
    steps: list[dict[str, float]]  # the training loop's numbers of each step
    seconds: float


def parse_arguments(description: str | None, *, result: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="where pictures and shards are, or go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: one seed, few steps; its figures say nothing"
    )
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--save", action="store_true", help=f"write to {result.parent.name}/{result.name} too")
    return parser.parse_args()


def embed_emoji(folder: Path, *, num_versions: int, has_random_weights: bool = False) -> Features:
    """Fetches, renders and packs the demo's emoji where they are missing, and embeds them."""
    packages = fetch_vendor_packages(folder / "packages")
    render_pictures(packages, folder / "pictures", PICTURE_SIZE, num_processes=num_cores())
    source = ClassFolders(ClassFoldersSettings(folder=folder / "pictures"))
    load_torch(num_threads=torch.get_num_threads())
    encoder = create_pretrained_encoder("lite0", image_size=IMAGE_SIZE)
    if has_random_weights:
        torch.manual_seed(0)
        encoder = create_encoder(encoder.settings)
    augmented = TrainingTransform(AUGMENTATION, IMAGE_SIZE)
    as_is = EvaluationTransform(encoder.settings.input)
    with write_shards(source, folder / "shards", ShardSettings(), num_processes=num_cores()) as shards:
        rows, test_rows = shards.rows("train"), shards.rows("test")
        train = [
            _embed(
                encoder,
                [
                    augmented(CroppablePicture(shards.read_bytes(row)), seed=version * shards.num_samples + int(row))
                    for row in rows
                ],
            )
            for version in range(num_versions)
        ]
        test = _embed(encoder, [as_is(decode_image(shards.read_bytes(row))) for row in test_rows])
        test_labels = torch.from_numpy(shards.labels[test_rows])
        return Features(torch.stack(train), shards.labels[rows], test, test_labels)


def train_projection(
    features: Features, loss_settings: LossSettings, *, batch_size: int, num_steps: int, seed: int, dim: int = 128
) -> Run:
    """Trains a new projection and measures it on the unseen classes."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    num_features = features.train.shape[-1]
    projection = nn.Sequential(nn.LayerNorm(num_features), nn.Linear(num_features, dim))
    settings = AdamWSettings(lr=1e-3, warmup_steps=num_steps // 10)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for group in optimizer.param_groups:
        group["highest_lr"] = settings.lr
    labels = features.train_labels
    loss = create_loss(loss_settings, dim=dim, classes=torch.from_numpy(np.unique(labels)), seed=seed)
    plan = ClassBalancedBatches(
        labels,
        np.arange(len(labels)),
        classes_per_batch=batch_size // IMAGES_PER_CLASS,
        images_per_class=IMAGES_PER_CLASS,
        seed=seed,
    )
    chance = np.random.default_rng(seed)
    steps = []
    for step in range(num_steps):
        factor = schedule_factor(step, settings, num_steps=num_steps, num_steps_per_epoch=plan.num_steps_per_epoch)
        set_learning_rate(optimizer, factor)
        rows = plan.rows_of_step(step)
        versions = chance.integers(len(features.train), size=len(rows))
        embeddings = functional.normalize(projection(features.train[versions, rows]), dim=1)
        scored = score_across_ranks(embeddings, torch.from_numpy(labels[rows]), loss, step=step, world=World())
        optimizer.zero_grad(set_to_none=True)
        embeddings.backward(scored.gradient)
        steps.append(measure_batch(scored, loss, step=step, world=World()))
        optimizer.step()
        loss.observe(steps[-1])
    with torch.no_grad():
        rate = unseen_hit_rate(functional.normalize(projection(features.test), dim=1), features.test_labels)
    return Run(rate, steps, time.perf_counter() - started)


def unseen_hit_rate(embeddings: Float[Tensor, "pictures dim"], labels: Int64[Tensor, "pictures"]) -> float:
    """hit_rate@1 of pictures that each search all others."""
    num_hits, num_queries = neighbour_counts(embeddings, labels, ks=(1,))["hit_rate_at_1"]
    return num_hits / num_queries


def footer(seconds: float, *, threads: int) -> list[str]:
    """Machine, date, commit and command."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return [
        f"{processor()}, {threads} threads, {seconds / 60:.1f} minutes in all; load at the end "
        f"{os.getloadavg()[0]:.1f}. Python {platform.python_version()}, torch {torch.__version__}, "
        f"{datetime.date.today()}, commit {commit()}.",
        f"Command: `{command}`",
    ]


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.machine()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "none yet"


def _embed(encoder: Encoder, pictures: list[ndarray]) -> Float[Tensor, "pictures features"]:
    parts = [np.stack(pictures[start : start + _CHUNK]) for start in range(0, len(pictures), _CHUNK)]
    # A copy, since what inference mode made takes part in no graph.
    return torch.cat([embed_pixels(encoder, torch.from_numpy(part)) for part in parts]).clone()
