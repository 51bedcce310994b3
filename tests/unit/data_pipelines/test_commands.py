"""`lookalike data`: exit codes, one-line errors, JSON, and what check and describe find."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.check import check_shard_set
from data_pipelines.settings import ClassFoldersSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from tests.unit.data_pipelines.small_shards import SMALL_SHARDS, write_class_folders


@pytest.fixture
def copied(shard_set, tmp_path) -> Path:
    return Path(shutil.copytree(shard_set.folder, tmp_path / "copied"))


def flip_byte(path: Path, offset: int) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def kinds_found(folder: Path, *, full: bool) -> set[str]:
    with ShardSet.open(folder) as shard_set:
        return {finding.kind for finding in check_shard_set(shard_set, full=full).findings}


def test_write_check_describe(run, pictures, tmp_path):
    shards, page = tmp_path / "shards", tmp_path / "page.html"
    code, out, _ = run("write", pictures, shards, "--shard-size", "4k", "--processes", 1, "--json")
    written = json.loads(out)
    assert (code, written["images"], written["classes"], written["splits"]) == (0, 20, 5, {"all": 20})
    code, out, _ = run("check", shards, "--full", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"is_sound": True, "num_samples": 20, "num_pictures_read": 20, "findings": []},
    )
    code, out, _ = run("describe", shards, "--html", page, "--json")
    described = json.loads(out)
    assert code == 0
    assert described["class_sizes"] == {"1": 0, "2-3": 2, "4-7": 3}
    assert described["extensions"] == {"jpg": 20}
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 20
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", text) == []
    code, out, _ = run("describe", shards)
    assert "all: 20 images of 5 classes" in out


def test_a_dry_run_writes_nothing(run, pictures, tmp_path):
    code, out, _ = run("write", pictures, tmp_path / "shards", "--dry-run", "--json", "--shard-size", "4K")
    planned = json.loads(out)
    assert (code, planned["images"], planned["classes"]) == (0, 20, 5)
    assert planned["bytes"] == sum(path.stat().st_size for path in pictures.rglob("*.jpg"))
    assert planned["shards"] > 2
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_a_finished_shard_set_is_reused_with_a_line(run, pictures, tmp_path, caplog):
    arguments = ("write", pictures, tmp_path / "shards", "--processes", 1)
    assert run(*arguments)[0] == 0
    with caplog.at_level("INFO"):
        assert run(*arguments)[0] == 0
    assert "is finished already" in caplog.text
    code, _, err = run(*arguments, "--max-side", 32)
    assert code == 5
    assert "lookalike data: ArtifactError:" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["write", "{tmp}/nowhere", "{tmp}/out"], 3, "is neither a folder nor a listing"),
        (["write", "{tmp}", "{tmp}/out"], 3, "holds no pictures"),
        (["write", "{tmp}", "{tmp}/out", "--quality", "90"], 2, "--quality has no effect without --max-side"),
        (["write", "{tmp}", "{tmp}/out", "--seed", "1"], 2, "--seed has no effect"),
        (["write", "{tmp}/list.csv", "{tmp}/out", "--seed", "1"], 2, "a listing names its splits itself"),
        (["write", "{tmp}/list.csv", "{tmp}/out"], 3, "list.csv does not exist"),
        (["write", "{tmp}", "{tmp}/out", "--test-class-share", "2"], 2, "test_class_share"),
        (["write", "{tmp}", "{tmp}/out", "--max-bad-share", "-1"], 2, "max_quarantine_share"),
        (["write", "{tmp}", "{tmp}/out", "--shard-size", "many"], 2, "is not a size such as"),
        (["check", "{tmp}"], 5, "is not a finished shard set"),
        (["describe", "{tmp}"], 5, "is not a finished shard set"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(run, tmp_path, arguments, code, message):
    found, out, err = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.parametrize("full", [False, True])
def test_check_finds_a_single_flipped_byte_of_a_picture(copied, full):
    with ShardSet.open(copied) as shard_set:
        offset, shard = shard_set.samples["offset"][11].as_py(), shard_set.samples["shard"][11].as_py()
    flip_byte(copied / shard, offset + 100)
    assert {"file_checksum", "picture_checksum"} <= kinds_found(copied, full=full)


def test_check_finds_a_flipped_byte_anywhere(copied):
    for path in sorted(copied.iterdir()):
        if path.suffix == ".tar":
            flip_byte(path, path.stat().st_size - 1)
            assert kinds_found(copied, full=False) == {"file_checksum"}
            flip_byte(path, path.stat().st_size - 1)
    assert kinds_found(copied, full=False) == set()


def test_check_finds_cut_missing_and_unknown_files(run, copied):
    first, second, *_ = sorted(copied.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:700])
    (copied / "note.txt").touch()
    assert kinds_found(copied, full=True) == {"missing_file", "file_size", "unknown_file", "unreadable", "streaming"}
    code, out, _ = run("check", copied)
    assert code == 3
    assert "DAMAGED" in out


def test_check_finds_what_splits_share(tmp_path):
    write_class_folders(tmp_path / "pictures", {"train/a": 2, "train/b": 2, "test/b": 1})
    (tmp_path / "pictures" / "test" / "b" / "00.jpg").write_bytes(
        (tmp_path / "pictures" / "train" / "a" / "01.jpg").read_bytes()
    )
    settings = ClassFoldersSettings(folder=tmp_path / "pictures", allows_shared_classes=True)
    with write_shards(ClassFolders(settings), tmp_path / "shards", SMALL_SHARDS) as shard_set:
        report = check_shard_set(shard_set)
    assert report.is_sound
    assert {finding.kind: finding.message.split(",")[0] for finding in report.findings} == {
        "duplicates_across_splits": "1 of 4 pictures are in more than one split",
        "class_leakage": "1 of 2 classes are in more than one split",
    }


def test_help_loads_no_heavy_library():
    program = (
        "import sys\nfrom data_pipelines.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'PIL', 'webdataset', 'numpy')))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
