"""Every recipe under configs/train is read, its network is built, and it takes one real step."""

import json
from pathlib import Path

import pytest

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from lookalike.events import read_events
from lookalike.settings import load_settings
from tests.drawn_pictures import draw_class_folders
from training.dry_run import plan_of_run
from training.loop import train
from training.settings import TrainSettings

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "train"
RECIPES = sorted(FOLDER.glob("*.yaml"))
OUR_OWN = ("class_folders", "quick_start")


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_classes")
    draw_class_folders(folder / "pictures" / "train", range(2), pictures_per_class=2)
    draw_class_folders(folder / "pictures" / "test", range(2, 4), pictures_per_class=2)
    source = ClassFolders(ClassFoldersSettings(folder=folder / "pictures"))
    write_shards(source, folder / "shards", ShardSettings(), num_processes=1).close()
    return folder / "shards"


def is_vision_transformer(path: Path) -> bool:
    return load_settings(TrainSettings, path).encoder.backbone.startswith("vit")


def one_of_each_network() -> list[object]:
    """Recipes of one network, loss and optimizer differ in numbers only: one of them stands for all."""
    chosen = {}
    for path in RECIPES:
        settings = load_settings(TrainSettings, path)
        chosen[settings.encoder.backbone, settings.loss.model_dump_json(), settings.optimizer.schedule] = path
    # A vision transformer takes pictures of its own size only: 10 to 60 seconds a step.
    return [
        pytest.param(path, marks=[pytest.mark.slow] if is_vision_transformer(path) else [], id=path.stem)
        for path in chosen.values()
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_command_cost_and_result(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"configs/train/{path.name}" in head[0]
    assert head[1].startswith("# Cost:")
    assert any("Expect" in line for line in head)
    if path.stem not in OUR_OWN:
        assert "not run here" in head[1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_rate_falls(path: Path) -> None:
    settings = load_settings(TrainSettings, path)
    plan = plan_of_run(settings, num_steps_per_epoch=10)
    assert plan["images_per_step"] == settings.batch.num_images
    first, *_, last = (moment["lr"] for moment in plan["schedules"])
    assert first > 0
    assert last < settings.optimizer.lr


@pytest.mark.parametrize("path", one_of_each_network())
def test_a_recipe_takes_a_real_step(path: Path, two_classes: Path, tmp_path: Path) -> None:
    """Random weights and few pictures; network, loss, optimizer and augmentation are the recipe's."""
    overrides = [
        f"shards={two_classes}",
        f"run={tmp_path / 'run'}",
        "weights={source: random}",
        "batch={classes_per_batch: 2, images_per_class: 2, chunk_size: 2}",
        "num_steps=1",
        "optimizer.warmup_steps=0",
        "num_workers=0",
    ]
    if not is_vision_transformer(path):
        overrides += ["encoder.input={size: 32}"]
    if load_settings(TrainSettings, path).optimizer.milestones:
        overrides += ["optimizer.milestones=[]"]  # they lie beyond one step
    settings = load_settings(TrainSettings, path, overrides)
    encoder = train(settings)
    (event,) = read_events(tmp_path / "run" / "events-rank0.jsonl", "step")
    assert event["gradient_norm"] > 0
    assert event["lr"] == pytest.approx(settings.optimizer.lr)
    stored = json.loads((encoder / "encoder.json").read_text(encoding="utf-8"))
    assert stored["projection_dim"] == load_settings(TrainSettings, path).encoder.projection_dim
