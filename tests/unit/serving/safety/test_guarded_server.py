"""The command itself, in a process of its own: what the other tests promise is switched on."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from serving.safety.key_file import add_key
from tests.unit.serving.small_index import SmallIndex

WAIT = 0.5


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def key(keys: Path) -> str:
    return add_key(keys, "shop", ("read",), today="2026-01-31")


@pytest.fixture(scope="module")
def port(small_index: SmallIndex, keys: Path, key: str) -> Iterator[int]:
    limits = {"max_wait_seconds": WAIT, "max_body_seconds": WAIT, "max_body_bytes": 4096}
    settings = {"index": str(small_index.index), "host": "0.0.0.0", "port": 0, "keys": str(keys), "limits": limits}
    file = keys.with_name("serving.yaml")
    file.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "serving", "--settings", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["port"]
        finally:
            server.terminate()


def test_strangers_are_turned_away(port: int, key: str) -> None:
    address = f"http://127.0.0.1:{port}/v1/info"
    assert httpx2.get(address).json()["code"] == "key.missing"
    assert httpx2.get(address, headers={"Authorization": f"Bearer {key}"}).status_code == 200


POST = b"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WITH_KEY = POST + b"Authorization: Bearer %s\r\n"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", None),
        (POST, None),
        (WITH_KEY + b"Content-Length: 99\r\n\r\n{", "body.too_slow"),
        (WITH_KEY + b"Content-Length: 9999\r\n\r\n", "body.too_large"),
        (POST + b"Content-Length: 9999\r\n\r\n", "key.missing"),
        (b"\x16\x03\x01", "request.malformed"),
    ],
)
def test_who_keeps_it_waiting_is_cut_off(port: int, key: str, sent: bytes, code: str | None) -> None:
    sent = sent.replace(b"%s", key.encode())
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20 * WAIT) as connection:
        connection.sendall(sent)
        answer = b""
        try:
            while part := connection.recv(65_536):
                answer += part
        except ConnectionResetError:
            pass
    assert time.monotonic() - started < 20 * WAIT
    body = answer.partition(b"\r\n\r\n")[2]
    assert (json.loads(body)["code"] if body else None) == code
