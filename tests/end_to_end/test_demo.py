"""`lookalike demo --images` on small folders; the emoji demo itself is `make demo`, and slow."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.drawn_pictures import draw_class_folders

QUICK = ("num_steps=2", "optimizer.warmup_steps=0", "encoder.input.size=32", "num_workers=0")


def demo(*arguments: str) -> tuple[dict[str, Any], str]:
    result = subprocess.run(
        [sys.executable, "-m", "lookalike", "demo", "--no-serve", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_own_class_folders_are_trained_on_measured_and_indexed(tmp_path: Path) -> None:
    draw_class_folders(tmp_path / "pictures", range(10), pictures_per_class=4)
    arguments = ("--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), *QUICK)
    numbers, _ = demo(*arguments)
    assert list(numbers["evaluation"]["contenders"]) == ["raw pixels", "frozen ImageNet encoder", "trained with RS@k"]
    assert Path(numbers["report"]).exists()
    assert (Path(numbers["index"]) / "CURRENT").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again, log = demo(*arguments)
    assert "is trained already" in log
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == before
    assert again["evaluation"]["contenders"] == numbers["evaluation"]["contenders"]


def test_a_flat_folder_is_indexed_with_the_pretrained_encoder(tmp_path: Path) -> None:
    draw_class_folders(tmp_path / "classes", range(4), pictures_per_class=3)
    (tmp_path / "flat").mkdir()
    for picture in (tmp_path / "classes").rglob("*.png"):
        shutil.copy(picture, tmp_path / "flat" / f"{picture.parent.name}-{picture.name}")
    numbers, _ = demo("--images", str(tmp_path / "flat"), "--out", str(tmp_path / "out"))
    assert numbers["report"] is None
    assert (Path(numbers["index"]) / "CURRENT").exists()
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_emoji_demo_reaches_what_it_claims(tmp_path: Path) -> None:
    numbers, _ = demo("--out", str(tmp_path / "out"))
    metrics = {name: entry["metrics"] for name, entry in numbers["evaluation"]["contenders"].items()}
    trained, frozen = metrics["trained with RS@k"]["R@1"]["mean"], metrics["frozen ImageNet encoder"]["R@1"]["mean"]
    assert trained >= 0.54
    assert trained - frozen >= 0.14
