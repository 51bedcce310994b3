"""Shard sets that several files test with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.__main__ import main
from data_pipelines.shard_set import ShardSet
from tests.unit.data_pipelines.small_shards import write_class_folders, write_small_shards


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five classes of 2 to 6 pictures in one split."""
    return write_class_folders(tmp_path / "pictures", {f"class {n}": n for n in range(2, 7)})


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Train: five classes of 2 to 6 pictures. Test: two classes. Several shards each; never changed by tests."""
    root = tmp_path_factory.mktemp("shared")
    train = {f"train/class {n}": n for n in range(2, 7)}
    write_class_folders(root / "pictures", {**train, "test/seven": 4, "test/eight": 3})
    with write_small_shards(root / "pictures", root / "shards") as opened:
        yield opened


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`lookalike data`, in this process."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run_command
