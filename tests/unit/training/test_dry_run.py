from pathlib import Path

import pytest

from lookalike.settings import validate_settings
from tests.unit.training.small_runs import settings_file
from training.__main__ import main
from training.dry_run import plan_of_run
from training.settings import TrainSettings


def test_the_plan_shows_the_course_of_what_changes() -> None:
    tree = {
        "shards": "shards",
        "run": Path("run"),
        "num_steps": 9,
        "batch": {"classes_per_batch": 4, "images_per_class": 2},
        "encoder": {"backbone": "resnet10t"},
        "optimizer": {"lr": 0.1, "schedule": "constant", "warmup_steps": 2},
        "loss": {
            "ks": {"schedule": "linear", "start": [9], "end": [1], "num_steps": 8},
            "rank_temperature": {"schedule": "linear", "start": 0.1, "end": 0.02, "num_steps": 8},
            "k_temperature": {"schedule": "live_fraction", "lowest": 1, "highest": 8},
        },
    }
    plan = plan_of_run(validate_settings(TrainSettings, tree, where="test"), num_steps_per_epoch=3)
    assert (plan["images_per_step"], plan["steps"], plan["epochs"]) == (8, 9, 3.0)
    rows = plan["schedules"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert [row["lr"] for row in rows] == [0.05, 0.1, 0.1, 0.1, 0.1]
    assert [row["rank_temperature"] for row in rows] == [0.1, 0.08, 0.06, 0.04, 0.02]
    assert [row["ks"] for row in rows] == [[9], [7], [5], [3], [1]]
    assert rows[0]["k_temperature"] == "1.0 to 8.0, by a live fraction of 0.5"


def test_a_loss_without_schedules_shows_the_learning_rate() -> None:
    tree = {
        "shards": "shards",
        "run": Path("run"),
        "num_steps": 2,
        "batch": {"classes_per_batch": 4},
        "encoder": {"backbone": "resnet10t"},
        "optimizer": {"lr": 0.1},
        "loss": {"name": "fast_ap"},
    }
    plan = plan_of_run(validate_settings(TrainSettings, tree, where="test"), num_steps_per_epoch=1)
    assert plan["loss"] == "fast_ap"
    assert plan["schedules"] == [{"step": 0, "lr": 0.1}, {"step": 1, "lr": 0.05}]


def test_a_dry_run_refuses_what_validation_could_not_look_at(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = {"class_share": 0.35, "steps_between": 1, "max_pictures": 2}
    with pytest.raises(SystemExit) as refused:
        main([str(settings_file(tmp_path, shards_folder, validation=validation)), "--dry-run"])
    assert refused.value.code == 2
    assert "no two of one class" in capsys.readouterr().err


def test_a_dry_run_refuses_a_backbone_that_there_is_not(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = settings_file(tmp_path, shards_folder)
    for name, code in (("resnet10tt", 2), ("resnet10t", 0)):
        with pytest.raises(SystemExit) as ended:
            main([str(file), f"encoder.backbone={name}", "--dry-run"])
        assert ended.value.code == code
    assert "no model named 'resnet10tt'. Near names: resnet10t," in capsys.readouterr().err
