"""Gradients of all processes against those of one, before a run."""

import json
from pathlib import Path

import pytest

from lookalike.world import World
from tests.unit.training.small_runs import settings_for
from training.__main__ import main
from training.verify_gradients import GradientCheck
from training.verify_run import verify_run, with_small_batch


@pytest.mark.parametrize("loss", [{"mixes_similarities": True}, {"name": "proxy_nca"}, {"name": "contrastive"}])
def test_the_gradients_of_a_run_are_verified_with_its_own_loss(
    shards_folder: Path, tmp_path: Path, loss: dict[str, object]
) -> None:
    batch = {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": "auto", "num_kept_chunks": "auto"}
    settings = settings_for(shards_folder, tmp_path / "run", loss=loss, batch=batch)
    checks = verify_run(settings, world=World())
    assert [check.precision for check in checks] == ["float32", "float64"]
    assert all(check.has_passed for check in checks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("classes", [24, 1200])
def test_the_batch_of_the_check_is_small_and_divides(tmp_path: Path, classes: int, world_size: int) -> None:
    batch = {"classes_per_batch": classes, "images_per_class": 4, "chunk_size": 50}
    small = with_small_batch(settings_for(tmp_path, tmp_path, batch=batch), World(0, world_size)).batch
    assert small.num_images % world_size == 0
    num_pictures = small.num_images // world_size
    assert min(32, classes * 4 // world_size) <= num_pictures <= 64
    assert isinstance(small.chunk_size, int)
    assert num_pictures % small.chunk_size == 0
    assert small.chunk_size <= 50


def test_gradients_that_differ_give_exit_code_1(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(settings_for(shards_folder, tmp_path / "run", num_threads=1).model_dump(mode="json")))
    for difference, code in ((1.0, 1), (0.0, 0)):
        check = GradientCheck("ddp", 2, "float32", {"backbone.conv1": difference})
        monkeypatch.setattr("training.verify_run.verify_gradients", lambda *args, check=check, **options: [check])
        with pytest.raises(SystemExit) as ended:
            main([str(config), "--verify-gradients"])
        assert ended.value.code == code
        assert ("FAILED: backend ddp over 2 processes" in capsys.readouterr().out) == bool(code)
