"""How fast is class-balanced reading from shards, beside reading them in order?

    python benchmarks/reading.py            # five minutes on two cores, prints a table
    python benchmarks/reading.py --save     # and writes it to benchmarks/results/reading_cpu.md

Every way to read decodes the same JPEGs with the same function, applies the same training transform, and gets batches
of the same size from as many worker processes. A round runs all ways once, each in a process of its own; compared are
the ways of one round, so other work on the machine hits all alike. The clock starts with the first batch: starting
workers is not reading. A loader that is not installed is left out.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.decode import CroppablePicture
from data_pipelines.loader import training_batches
from data_pipelines.settings import AugmentationSettings, ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from data_pipelines.transforms import TrainingTransform
from lookalike.world import World

RESULT = Path(__file__).parent / "results" / "reading_cpu.md"
NUM_CLASSES, IMAGES_PER_CLASS = 200, 10
MAX_SHARD_BYTES = 12 << 20
BATCH_SIZE = 80
NUM_PASSES = 3
NUM_WORKERS = 2
TRANSFORM = TrainingTransform(AugmentationSettings(), 224)


def class_balanced(folder: Path) -> Iterator[torch.Tensor]:
    shard_set = ShardSet.open(folder / "shards")
    plan = ClassBalancedBatches(
        shard_set.labels, shard_set.rows(), classes_per_batch=BATCH_SIZE // 4, images_per_class=4, seed=0
    )
    steps = range(NUM_PASSES * shard_set.num_samples // BATCH_SIZE)
    for batch in training_batches(
        shard_set, plan, TRANSFORM, world=World(), seed=0, steps=steps, num_workers=NUM_WORKERS
    ):
        yield batch.pixels


def plain_webdataset(folder: Path) -> Iterator[torch.Tensor]:
    import webdataset

    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=False).map(lambda sample: pixels_of(sample["jpg"]))
    loader = webdataset.WebLoader(
        dataset.batched(BATCH_SIZE, collation_fn=torch.stack),
        batch_size=None,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
    )
    for _ in range(NUM_PASSES):
        yield from loader


def plain_files(folder: Path) -> Iterator[torch.Tensor]:
    yield from shuffled_files(folder, torch.utils.data.DataLoader)


def torchdata_files(folder: Path) -> Iterator[torch.Tensor]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    yield from shuffled_files(folder, StatefulDataLoader)


def shuffled_files(folder: Path, loader_class: Callable[..., Any]) -> Iterator[torch.Tensor]:
    files = PictureFiles(sorted((folder / "pictures").rglob("*.jpg")))
    loader = loader_class(files, batch_size=BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS, persistent_workers=True)
    for _ in range(NUM_PASSES):
        yield from loader


class PictureFiles(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return pixels_of(self.paths[index].read_bytes())


def pixels_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(TRANSFORM(CroppablePicture(data), seed=zlib.crc32(data)))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to read; `package` is what must be installed for it."""

    title: str
    batches: Callable[[Path], Iterator[torch.Tensor]]
    package: str = "webdataset"


WAYS = {
    "balanced": Way("lookalike: class-balanced from shards", class_balanced),
    "webdataset": Way("webdataset: shards in order", plain_webdataset),
    "files": Way("torch DataLoader: files, shuffled", plain_files),
    "torchdata": Way("torchdata StatefulDataLoader: files, shuffled", torchdata_files, "torchdata"),
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(WAYS[arguments.measure], arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = draw_pictures(folder / "pictures")
        source = ClassFolders(ClassFoldersSettings(folder=folder / "pictures"))
        write_shards(source, folder / "shards", ShardSettings(max_shard_bytes=MAX_SHARD_BYTES))
        table = report(folder, num_bytes=num_bytes, num_rounds=arguments.rounds)
    print(table)
    if arguments.save:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(table + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def draw_pictures(folder: Path) -> int:
    """Shapes on a gradient, with the noise of a camera: as large as photos are. Returns their bytes."""
    num_bytes = 0
    for index in range(NUM_CLASSES * IMAGES_PER_CLASS):
        random = np.random.default_rng(index)
        width, height = (int(side) for side in random.integers((460, 370), (541, 431)))
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for _ in range(12):
            centre, radius = random.integers(0, (width, height)), int(random.integers(8, 60))
            colour = tuple(random.integers(0, 256, 3).tolist())
            pen.regular_polygon((*centre.tolist(), radius), int(random.integers(3, 9)), fill=colour)
        noise = random.normal(0, 3, (height, width, 1))
        noisy = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        path = folder / f"{index // IMAGES_PER_CLASS:03d}" / f"{index % IMAGES_PER_CLASS}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy.save(path, quality=90)
        num_bytes += path.stat().st_size
    return num_bytes


@dataclass(frozen=True, slots=True)
class Speed:
    images_per_second: float
    images_per_cpu_second: float  # of all processes together


def measure(way: Way, folder: Path) -> dict[str, float]:
    """Speed from the first batch to the last."""
    batches = way.batches(folder)
    next(batches)
    started, started_cpu, num_images = time.perf_counter(), cpu_seconds_of_group(), 0
    seconds = cpu_seconds = 0.0
    for batch in batches:
        num_images += len(batch)
        # Taken at every batch: after the last one the workers are gone.
        seconds, cpu_seconds = time.perf_counter() - started, cpu_seconds_of_group() - started_cpu
    return {"images_per_second": num_images / seconds, "images_per_cpu_second": num_images / cpu_seconds}


def cpu_seconds_of_group() -> float:
    """What this process and its workers have used so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has just ended
            # The name in parentheses may hold spaces; then state, parent, group, ..., user time, system time.
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == os.getpgrp():
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_apart(name: str, folder: Path) -> Speed:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, process_group=0)
    return Speed(**json.loads(result.stdout))


def report(folder: Path, *, num_bytes: int, num_rounds: int) -> str:
    names = [name for name, way in WAYS.items() if importlib.util.find_spec(way.package)]
    rounds = []
    for number in range(num_rounds):
        # Each round starts elsewhere, so no way always follows the same other one.
        turned = names[number % len(names) :] + names[: number % len(names)]
        rounds.append({name: measure_apart(name, folder) for name in turned})
    num_images = NUM_CLASSES * IMAGES_PER_CLASS
    lines = [
        "# Reading for training",
        "",
        f"`python benchmarks/reading.py --save`, {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}; {num_images:,} JPEGs of about 500 x 400 pixels and "
        f"{num_bytes / num_images / 1000:.0f} kB, random resized crop to {TRANSFORM.size} pixels and flip, "
        f"batches of {BATCH_SIZE}, {NUM_WORKERS} workers, medians of {num_rounds} rounds. "
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "| way to read | images/s (least to most) | beside webdataset | images per CPU second | beside webdataset |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        speeds = [measured[name].images_per_second for measured in rounds]
        cells = [
            f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})",
            f"{median_ratio(rounds, name, lambda speed: speed.images_per_second):.2f}",
            f"{statistics.median(measured[name].images_per_cpu_second for measured in rounds):.0f}",
            f"{median_ratio(rounds, name, lambda speed: speed.images_per_cpu_second):.2f}",
        ]
        lines.append(f"| {WAYS[name].title} | {' | '.join(cells)} |")
    lines += ["", "Decoding and the transform alone, one thread, images per CPU second:", "", *decoder_lines(folder)]
    return "\n".join(lines)


def median_ratio(rounds: list[dict[str, Speed]], name: str, value: Callable[[Speed], float]) -> float:
    return statistics.median(value(measured[name]) / value(measured["webdataset"]) for measured in rounds)


def decoder_lines(folder: Path) -> list[str]:
    """The least CPU time of some repeats for each decoder, and each size of crop."""
    pictures = [path.read_bytes() for path in sorted((folder / "pictures").rglob("*.jpg"))[::20]]
    torch.set_num_threads(1)
    lines = ["| decoder | to 224 pixels | to 96 pixels, scaled decoding |", "|---|---|---|"]
    if importlib.util.find_spec("simplejpeg"):
        lines.append(f"| simplejpeg (extra `fast`) | {images_per_cpu_second(pictures, 224):.0f} | ")
        lines[-1] += f"{images_per_cpu_second(pictures, 96):.0f} |"
    with mock.patch("data_pipelines.fast_jpeg.decode", return_value=None):
        lines.append(f"| Pillow | {images_per_cpu_second(pictures, 224):.0f} | ")
        lines[-1] += f"{images_per_cpu_second(pictures, 96):.0f} |"
    return lines


def images_per_cpu_second(pictures: list[bytes], size: int) -> float:
    transform, seconds = TrainingTransform(AugmentationSettings(), size), []
    for _ in range(5):
        started = time.process_time()
        for seed, data in enumerate(pictures):
            transform(CroppablePicture(data), seed=seed)
        seconds.append(time.process_time() - started)
    return len(pictures) / min(seconds)


if __name__ == "__main__":
    main()
