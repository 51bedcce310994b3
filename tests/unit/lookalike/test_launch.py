import os
import subprocess
import sys
from pathlib import Path

import pytest

from lookalike.__main__ import main
from lookalike.launch import may_hang_after_restart
from tests.unit.training.small_runs import settings_file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return settings_file(tmp_path, "nowhere")


def test_launch_becomes_torchrun_with_what_its_restarts_need(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    monkeypatch.setenv("SOMETHING", "else")
    options = ["--nproc-per-node", "2", "--max-restarts", "3"]
    main(["launch", *options, "lookalike", "train", str(config), "run=r"])
    ((program, command, environment),) = calls
    assert program == sys.executable
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--module"),
        *options,
        *("lookalike", "train", str(config), "run=r"),
    ]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment["SOMETHING"] == "else"


def test_a_setting_that_is_there_already_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    main(["launch", "lookalike", "doctor"])
    assert calls[0][2]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "0"


@pytest.mark.parametrize(
    ("restarts", "shares_store", "may_hang"),
    [("3", "True", True), ("3", "False", False), ("0", "True", False), (None, None, False)],
)
def test_a_worker_sees_whether_a_restart_may_hang(
    restarts: str | None, shares_store: str | None, may_hang: bool
) -> None:
    environment = {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shares_store}
    assert may_hang_after_restart({name: value for name, value in environment.items() if value}) == may_hang


def test_settings_that_are_refused_end_the_launch_before_any_worker_starts(config: Path) -> None:
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command = [sys.executable, "-m", "lookalike", "launch", *options, "lookalike", "train", str(config)]
    done = subprocess.run([*command, "num_stepz=3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    [first, second] = done.stderr.splitlines()
    assert first.startswith("lookalike train: SettingsError: Settings refused")
    assert second == "  num_stepz: there is no such setting; did you mean num_steps?"


@pytest.mark.parametrize("verb", [["train"], ["train", "run"]])
def test_a_backbone_that_there_is_not_ends_the_launch(
    verb: list[str], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("torchrun was started"))
    with pytest.raises(SystemExit) as refused:
        main(["launch", "--standalone", "lookalike", *verb, str(config), "encoder.backbone=resnet10tt"])
    assert refused.value.code == 2
    assert "Near names: resnet10t," in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["train"], ["train", "run"], ["embed"]])
def test_the_help_of_a_verb_is_printed_and_starts_nothing(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("torchrun was started"))
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--standalone", "--max-restarts", "3", "lookalike", *verb, "--help"])
    assert not ended.value.code
    assert f"lookalike {verb[0]}" in capsys.readouterr().out
