"""The whole chain on one folder: pictures -> shards -> training -> embeddings -> index -> report -> server.

Every step is a stage's own function and publishes an artifact; a step whose artifact is there is not done again, so
an interrupted demo continues where it was, and a finished one is up in seconds.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import QUARANTINE_NAME, ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import GIVEN_SPLITS, ClassFolders
from demo.emoji_pictures import ATTRIBUTION_FILE, fetch_vendor_packages, render_pictures
from evaluation.embedding_sets import evaluate_embedding_sets
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.sources.embeddings import EmbeddingSource
from lookalike.encoder import Encoder, create_pretrained_encoder, load_encoder, save_encoder
from lookalike.errors import DataError, SettingsError
from lookalike.native_libraries import load_torch, num_cores
from lookalike.settings import apply_overrides, validate_settings
from training.loop import train
from training.settings import TrainSettings

_EMOJI_SIZE = 96  # pixels; what the page shows, and more than the encoder sees
_FLAT_FOLDER_SIZE = 224  # pixels; nothing is trained, so the pretrained resolution pays
_PHOTO_SIZE = 128  # pixels; a person's own classes are trained on in minutes at this size
_HELD_OUT_CLASS_SHARE = 0.3
_MOST_SEEDS = 20
_MOST_BAD_PICTURES = 0.5  # a demo shows what it can; half a folder of bad files is no picture folder
_MOST_EPOCHS = 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left its artifacts, and what it measured."""

    index: Path
    report: Path | None  # None for pictures without classes
    summary: dict[str, Any] | None
    lines: list[str]


def emoji_demo(folder: Path, *, overrides: list[str]) -> DemoResult:
    """Emoji of six vendors: trains on half of the things drawn, and searches among the other half."""
    settings = _recipe(folder, overrides)
    with _step("pictures: fetch and render emoji of six vendors"):
        packages = fetch_vendor_packages(folder / "packages")
        render_pictures(packages, folder / "pictures", _EMOJI_SIZE, num_processes=num_cores())
        shutil.copy(folder / "pictures" / ATTRIBUTION_FILE, folder / ATTRIBUTION_FILE)  # shards hold the pictures, too
    with _step("shards: pack the pictures"):
        shards = _write_shards(ClassFoldersSettings(folder=folder / "pictures"), folder / "shards")
    encoder = _train(settings)
    frozen = _frozen_encoder(folder, image_size=settings.encoder.input.size)
    with _step("embeddings: the unseen classes, by the frozen and the trained encoder"):
        embed_shards(frozen, shards, folder / "embeddings" / "frozen", split="test")
        trained_set = embed_shards(encoder, shards, folder / "embeddings" / "trained", split="test")
    with _step("index: build and measure"):
        build_index(EmbeddingSource(trained_set), folder / "index")
    return _report(folder, title="Emoji of unseen classes, across vendors")


def own_pictures_demo(pictures: Path, folder: Path, *, overrides: list[str]) -> DemoResult:
    """A person's own pictures: class folders are trained on, a flat folder is searched with the pretrained encoder."""
    if not pictures.is_dir():
        raise DataError(f"--images {pictures} is not a folder.")
    source = ClassFoldersSettings(folder=pictures)
    labels_of_split = _labels_of_split(source)
    num_classes = len({label for labels in labels_of_split.values() for label in labels} - {None})
    if num_classes == 0:
        if overrides:
            raise SettingsError(f"nothing is trained on a flat folder: {overrides[0]!r} has no effect. Leave it out.")
        return _flat_folder_demo(source, folder)
    source, holds_out = _hold_out_classes(source, labels_of_split)
    with _step(f"shards: pack the pictures of {num_classes} classes"):
        shards = _write_shards(source, folder / "shards")
    encoder = _train(_own_pictures_settings(shards, folder, overrides, split="train" if holds_out else None))
    with _step("embeddings: all pictures"):
        everything = embed_shards(encoder, shards, folder / "embeddings" / "all")
    with _step("index: build and measure"):
        build_index(EmbeddingSource(everything), folder / "index")
    if not holds_out:
        note = "There are too few classes to hold some out, so nothing is measured on unseen ones."
        return DemoResult(folder / "index", None, None, [note])
    frozen = _frozen_encoder(folder, image_size=encoder.settings.input.size)
    with _step("embeddings: the unseen classes, by the frozen and the trained encoder"):
        embed_shards(frozen, shards, folder / "embeddings" / "frozen", split="test")
        embed_shards(encoder, shards, folder / "embeddings" / "trained", split="test")
    return _report(folder, title=f"Unseen classes of {pictures.name}")


def _labels_of_split(source: ClassFoldersSettings) -> dict[str, list[str | None]]:
    labels: dict[str, list[str | None]] = {}
    for picture in ClassFolders(source).pictures():
        labels.setdefault(picture.split, []).append(picture.label)
    return labels


def _hold_out_classes(
    source: ClassFoldersSettings, labels_of_split: dict[str, list[str | None]]
) -> tuple[ClassFoldersSettings, bool]:
    """Folders train/ and test/ stay as they are; else the first seed whose two sides can be trained on and measured."""
    if set(labels_of_split) == set(GIVEN_SPLITS):
        return source, all(_is_measurable(labels) for labels in labels_of_split.values())
    for seed in range(_MOST_SEEDS):
        attempt = source.model_copy(update={"test_class_share": _HELD_OUT_CLASS_SHARE, "seed": seed})
        try:
            sides = _labels_of_split(attempt)
        except DataError:  # this seed leaves one side without classes
            continue
        if all(_is_measurable(labels) for labels in sides.values()):
            return attempt, True
    return source, False


def _is_measurable(labels: list[str | None]) -> bool:
    """At least two classes with at least two pictures."""
    return sum(size >= 2 for label, size in Counter(labels).items() if label is not None) >= 2


def _flat_folder_demo(source: ClassFoldersSettings, folder: Path) -> DemoResult:
    with _step("shards: pack the pictures"):
        shards = _write_shards(source, folder / "shards")
    encoder = _frozen_encoder(folder, image_size=_FLAT_FOLDER_SIZE)
    with _step("embeddings: all pictures, by the pretrained encoder"):
        embeddings = embed_shards(encoder, shards, folder / "embeddings" / "all")
    with _step("index: build and measure"):
        build_index(EmbeddingSource(embeddings), folder / "index")
    note = "There are no class folders, so nothing is trained or measured; the pretrained encoder searches."
    return DemoResult(folder / "index", None, None, [note])


def _recipe(folder: Path, overrides: list[str]) -> TrainSettings:
    tree = yaml.safe_load(resources.files("demo").joinpath("recipe.yaml").read_text(encoding="utf-8"))
    places = {"shards": str(folder / "shards"), "run": str(folder / "run")}
    return validate_settings(
        TrainSettings,
        apply_overrides({**tree, **places}, overrides),
        where=f"the demo's recipe {' '.join(overrides)}".strip(),
    )


def _own_pictures_settings(shards: ShardSet, folder: Path, overrides: list[str], *, split: str | None) -> TrainSettings:
    """The emoji recipe, fitted to the number of classes and pictures at hand."""
    rows = shards.rows(split)
    recipe = _recipe(folder, [])
    num_usable = sum(size >= 2 for size in Counter(shards.labels[rows].tolist()).values())
    if num_usable < 2:
        raise DataError(
            "training needs at least two classes with two pictures each. Give a flat folder to only search."
        )
    classes_per_batch = min(recipe.batch.classes_per_batch // 2, num_usable)
    images_per_step = classes_per_batch * recipe.batch.images_per_class
    num_steps = max(10, min(recipe.num_steps, _MOST_EPOCHS * len(rows) // images_per_step))
    fitted = [
        f"split={split or 'null'}",
        f"batch.classes_per_batch={classes_per_batch}",
        f"num_steps={num_steps}",
        f"optimizer.warmup_steps={min(recipe.optimizer.warmup_steps, num_steps // 5)}",
        f"encoder.input.size={_PHOTO_SIZE}",
        "augmentation.hue=0.05",  # colours of photos carry meaning, those of drawings are the artist's taste
        "augmentation.flip_probability=0.5",
    ]
    return _recipe(folder, [*fitted, *overrides])


def _write_shards(source: ClassFoldersSettings, folder: Path) -> ShardSet:
    settings = ShardSettings(max_quarantine_share=_MOST_BAD_PICTURES)
    shards = write_shards(ClassFolders(source), folder, settings, num_processes=num_cores())
    num_bad = shards.manifest.details["num_quarantined"]
    if num_bad:
        logger.warning("  left out %d pictures that cannot be opened; %s lists them", num_bad, folder / QUARANTINE_NAME)
    return shards


def _train(settings: TrainSettings) -> Encoder:
    load_torch(num_threads=settings.num_threads)
    with _step(f"training: {settings.num_steps} steps of {settings.batch.num_images} pictures with RS@k"):
        return load_encoder(train(settings))


def _frozen_encoder(folder: Path, *, image_size: int) -> Encoder:
    target = folder / f"frozen_encoder_{image_size}"
    if not target.exists():
        save_encoder(create_pretrained_encoder("lite0", image_size=image_size), target)
    return load_encoder(target)


def _report(folder: Path, *, title: str) -> DemoResult:
    with _step("report: raw pixels, frozen and trained encoder on the unseen classes"):
        summary, lines = evaluate_embedding_sets(
            [folder / "embeddings" / "frozen", folder / "embeddings" / "trained"],
            names=["frozen ImageNet encoder", "trained with RS@k"],
            with_raw_pixels=True,
            out=folder / "report",
            title=title,
        )
    return DemoResult(folder / "index", folder / "report" / "report.html", summary, lines)


@contextmanager
def _step(description: str) -> Iterator[None]:
    logger.info("%s", description)
    started = time.monotonic()
    yield
    logger.info("  done in %.1f s", time.monotonic() - started)
