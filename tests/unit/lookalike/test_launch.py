import os
import sys

import pytest

from lookalike.__main__ import main
from lookalike.launch import may_hang_after_restart


def test_launch_becomes_torchrun_with_what_its_restarts_need(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    monkeypatch.setenv("SOMETHING", "else")
    options = ["--nproc-per-node", "2", "--max-restarts", "3"]
    main(["launch", *options, "lookalike", "train", "c.yaml", "run=r"])
    ((program, command, environment),) = calls
    assert program == sys.executable
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--module"),
        *options,
        *("lookalike", "train", "c.yaml", "run=r"),
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
