"""`lookalike demo --images` on small folders; the emoji demo itself is `make demo`, and slow."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.settings import ClassFoldersSettings
from demo.chain import _hold_out_classes, _labels_of_split
from tests.drawn_pictures import draw_class_folders, draw_picture

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
    broken = tmp_path / "pictures" / "class03" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = ("--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), *QUICK)
    numbers, log = demo(*arguments)
    assert "left out 1 pictures that cannot be opened" in log
    assert list(numbers["evaluation"]["contenders"]) == ["raw pixels", "frozen ImageNet encoder", "trained with RS@k"]
    assert Path(numbers["report"]).exists()
    assert (Path(numbers["index"]) / "CURRENT").exists()
    before = written_at(tmp_path / "out")
    again, log = demo(*arguments)
    assert "is trained already" in log
    assert written_at(tmp_path / "out") == before, "a second run must reuse everything"
    assert again["evaluation"] == numbers["evaluation"]


def written_at(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "DEMO"}


# Names whose hash once left one side of the split empty, or with a single class.
@pytest.mark.parametrize(
    "names", [["rose", "tulip", "daisy", "lily", "iris", "poppy"], ["red", "green", "blue", "black", "white", "yellow"]]
)
def test_few_classes_are_held_out_so_that_both_sides_can_be_used(tmp_path: Path, names: list[str]) -> None:
    draw_class_folders(tmp_path / "pictures", range(6), pictures_per_class=2)
    for folder, name in zip(sorted((tmp_path / "pictures").iterdir()), names, strict=True):
        folder.rename(folder.with_name(name))
    source = ClassFoldersSettings(folder=tmp_path / "pictures")
    chosen, holds_out = _hold_out_classes(source, _labels_of_split(source))
    assert holds_out
    assert min(len(set(labels)) for labels in _labels_of_split(chosen).values()) >= 2


def test_given_splits_stay_and_too_few_classes_are_all_trained_on(tmp_path: Path) -> None:
    draw_class_folders(tmp_path / "given" / "train", range(3), pictures_per_class=2)
    draw_class_folders(tmp_path / "given" / "test", range(3, 6), pictures_per_class=2)
    given = ClassFoldersSettings(folder=tmp_path / "given")
    assert _hold_out_classes(given, _labels_of_split(given)) == (given, True)
    draw_class_folders(tmp_path / "few", range(3), pictures_per_class=2)
    few = ClassFoldersSettings(folder=tmp_path / "few")
    assert _hold_out_classes(few, _labels_of_split(few)) == (few, False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["my_pictures"], 2, "key.path=value"),
        (["--port", "99999"], 2, "port"),
        (["--images", "nowhere"], 3, "not a folder"),
        (["--images", "{flat}", "num_steps=3"], 2, "has no effect"),
        (["--out", "{flat}"], 5, "something else than a demo"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "flat").mkdir()
    draw_picture(0, 0).save(tmp_path / "flat" / "a.png")
    given = [argument.format(flat=tmp_path / "flat") for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "lookalike", "demo", "--no-serve", *out, *given],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "packages").exists()


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
    contenders = numbers["evaluation"]["contenders"]
    trained, frozen = (
        contenders[name]["leave_one_out"]["hit_rate@1"] / 100
        for name in ("trained with RS@k", "frozen ImageNet encoder")
    )
    assert trained >= 0.54
    assert trained - frozen >= 0.14
