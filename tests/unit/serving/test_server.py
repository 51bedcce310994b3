import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lookalike.errors import ResourceError, SettingsError
from lookalike.settings import validate_settings
from serving.server import serve
from serving.settings import ServingSettings
from tests.unit.serving.small_index import SmallIndex


def test_settings_load_neither_torch_nor_faiss_nor_the_web_framework() -> None:
    program = (
        "import sys, serving.settings, serving.__main__;"
        "print({'torch', 'faiss', 'fastapi', 'uvicorn'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("wrong", [{"port": 70_000}, {"host": ""}, {"colour": "red"}, {"limits": {"max_k": 0}}])
def test_wrong_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        validate_settings(ServingSettings, {"index": Path("index"), **wrong}, where="test")


def test_a_taken_port_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServingSettings(index=tmp_path / "there is no index", port=port)
        with pytest.raises(ResourceError, match=f"port {port} .* is taken"):
            serve(settings, on_ready=lambda _: None)


def test_a_foreign_address_is_refused(tmp_path: Path) -> None:
    settings = ServingSettings(index=tmp_path, host="203.0.113.1", port=0)  # reserved for documentation
    with pytest.raises(ResourceError, match=r"203\.0\.113\.1"):
        serve(settings, on_ready=lambda _: None)


def test_the_command_prints_its_address_once_it_answers_and_ends_cleanly(small_index: SmallIndex) -> None:
    command = [sys.executable, "-m", "serving", "--index", str(small_index.index), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        started = json.loads(server.stdout.readline())
        assert started["url"] == f"http://127.0.0.1:{started['port']}/"
        assert started["port"] != 0
        with urllib.request.urlopen(started["url"] + "readyz", timeout=10) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0, errors
    assert "Traceback" not in errors
