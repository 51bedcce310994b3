import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lookalike.errors import ResourceError, SettingsError
from lookalike.settings import validate_settings
from serving.__main__ import main
from serving.engine.query_engine import QueryEngine
from serving.server import RunningServer, require_free_port, serve
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


def test_a_free_port_can_be_required_early() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} .* is taken"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        pass  # Requiring it did not take it.


def test_a_start_that_fails_is_told_as_what_it_is(small_index: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: QueryEngine) -> None:
        raise ResourceError("no memory left")

    monkeypatch.setattr(QueryEngine, "warm_up", fail)
    announced: list[RunningServer] = []
    settings = ServingSettings(index=small_index.index, port=0)
    with pytest.raises(ResourceError, match="no memory left"):
        serve(settings, on_ready=announced.append)
    assert not announced


def test_a_foreign_address_is_refused(tmp_path: Path) -> None:
    # An address reserved for documentation.
    settings = ServingSettings(index=tmp_path, host="203.0.113.1", port=0, requires_keys=False)
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


class TestCommandLine:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[ServingSettings]:
        """Fills with the settings that would be served."""
        settings: list[ServingSettings] = []
        monkeypatch.setattr("serving.server.serve", lambda given, on_ready: settings.append(given))
        return settings

    @pytest.fixture
    def settings_file(self, tmp_path: Path) -> Path:
        file = tmp_path / "serving.yaml"
        file.write_text(
            "index: shop\nhost: 127.0.0.2\nport: 81\nshards: pictures\nnum_workers: 3\nlimits: {max_k: 7}\n"
        )
        return file

    def test_options_alone_are_enough(self, served: list[ServingSettings]) -> None:
        assert run_main("--index", "shop") == 0
        assert served == [ServingSettings(index=Path("shop"))]

    def test_a_file_sets_everything(self, served: list[ServingSettings], settings_file: Path) -> None:
        assert run_main("--settings", str(settings_file)) == 0
        expected = {
            "index": "shop",
            "host": "127.0.0.2",
            "port": 81,
            "shards": "pictures",
            "num_workers": 3,
            "limits": {"max_k": 7},
        }
        assert served == [ServingSettings.model_validate(expected)]

    @pytest.mark.parametrize(
        ("option", "given", "expected"),
        [
            ("--index", 'it\'s: #1 "käse" 🧀', Path('it\'s: #1 "käse" 🧀')),
            ("--host", "::1", "::1"),
            ("--port", "0", 0),
            ("--shards", "8", Path("8")),
        ],
    )
    def test_an_option_wins_over_the_file(
        self, served: list[ServingSettings], settings_file: Path, option: str, given: str, expected: object
    ) -> None:
        assert run_main("--settings", str(settings_file), option, given) == 0
        name = option.removeprefix("--")
        assert getattr(served[0], name) == expected
        assert run_main("--settings", str(settings_file)) == 0
        assert served[0].model_dump(exclude={name}) == served[1].model_dump(exclude={name})

    def test_without_an_index_nothing_is_served(
        self, served: list[ServingSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty.yaml").touch()
        for arguments in (["--port", "0"], ["--settings", str(tmp_path / "empty.yaml")]):
            assert run_main(*arguments) == 2
            assert "index" in capsys.readouterr().err
        assert not served

    @pytest.mark.parametrize(
        "damaged", ["CURRENT", "manifest.json", "vectors.npy", "ids.npy", "metadata.arrow", "encoder"]
    )
    def test_a_damaged_index_ends_with_one_line(
        self, small_index: SmallIndex, tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        index = tmp_path / "index"
        shutil.copytree(small_index.index, index)
        files = [file for file in index.rglob("*") if file.is_file() and damaged in {file.name, file.parent.name}]
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:2])
        assert run_main("--index", str(index), "--port", "0") == 5
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1
        assert str(index) in captured.err
        assert not captured.out


def run_main(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code
