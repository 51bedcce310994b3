import json
import subprocess
import sys
from pathlib import Path

import pytest

from lookalike.__main__ import VERBS, main
from lookalike.errors import SettingsError
from lookalike.native_libraries import _cpu_quota, num_cores
from lookalike.world import World


def lookalike(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lookalike", *arguments], capture_output=True, text=True, timeout=120)


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0, verb
        assert "Usage" in capsys.readouterr().out, verb


def test_usage_and_unknown_verbs() -> None:
    assert all(verb in lookalike("--help").stdout for verb in VERBS)
    unknown = lookalike("trian")
    assert unknown.returncode == 2
    assert "no verb 'trian'" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "missing.yaml"), 2, "does not exist"),
        (("embed", "nowhere", "--out", "x"), 2, "either --encoder or --pretrained"),
        (("index", "build", "--embeddings", "nowhere", "--out", "x"), 5, "not a finished embedding set"),
        (("index", "describe", "nowhere"), 5, "not an index"),
        (("search", "nowhere", "picture.png"), 5, "not an index"),
        (("evaluate", "nowhere"), 5, "not a finished embedding set"),
        (("evaluate", "nowhere", "--ks", "a"), 2, "not a list"),
        (("data", "check", "nowhere"), 5, "nowhere"),
    ],
)
def test_known_errors_are_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = lookalike(*arguments)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_doctor_finds_this_installation_sound() -> None:
    result = lookalike("doctor", "--json")
    assert result.returncode == 0, result.stderr
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["import order"]["state"] == "ok"
    assert findings["faiss"]["state"] == "ok"


def test_the_world_comes_from_the_launcher() -> None:
    assert World.detect({}) == World(0, 1, 0)
    launched = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert World.detect(launched) == World(3, 4, 1, 2)
    assert [World.detect(launched).share_of_cores(cores) for cores in (1, 2, 5)] == [1, 1, 2]
    with pytest.raises(SettingsError, match="RANK"):
        World.detect({"RANK": "four"})
    with pytest.raises(ValueError, match="outside"):
        World(rank=2, size=2)


def test_ctrl_c_says_how_to_go_on() -> None:
    program = (
        "import os, signal; from lookalike.console import new_app, run_command\n"
        "app = new_app('x')\n"
        "@app.command()\ndef wait() -> None:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "run_command(app, [], program='lookalike wait')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 130
    assert result.stderr.strip() == "lookalike wait: interrupted. Run the same command again to continue."


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000", 2), ("50000 100000", 0), ("max 100000", None), ("?", None)]
)
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert _cpu_quota(tmp_path / "cpu.max") == (sys.maxsize if cores is None else cores)
    assert num_cores() >= 1
