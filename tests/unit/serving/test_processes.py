"""Real server processes: what they load, how they end, what they keep, and what a client sees of all this."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import yaml

from indexing.building.build import build_index
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from tests.small_index import DIM, NUM_VECTORS, build, unit
from tests.unit.serving.engine.fake_encoder import picture_of
from tests.unit.serving.small_index import SmallIndex


@pytest.fixture(scope="module")
def vectors_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of the same 40 vectors, the second approximate and current."""
    index = tmp_path_factory.mktemp("vectors") / "index"
    build(index)
    [source] = index.parent.glob("source-*")
    build_index(ArraySource(source / "vectors.npy", source / "ids.npy"), index, IndexSettings(type="IVF2,Flat"))
    return index


@pytest.fixture
def own_index(vectors_index: Path, tmp_path: Path) -> Path:
    shutil.copytree(vectors_index, tmp_path / "index")
    return tmp_path / "index"


class Server:
    def __init__(self, process: "subprocess.Popen[str]", started: dict[str, Any]) -> None:
        self.process, self.url = process, started["url"]

    @property
    def workers(self) -> list[int]:
        """Process ids of those that serve."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return [int(pid) for pid, command in commands.items() if b"spawn_main" in command]


@contextlib.contextmanager
def serving(folder: Path, index: Path, **settings: Any) -> Iterator[Server]:
    tree = {"index": str(index), "port": 0, "allows_writes": True, **settings}
    tree.setdefault("observability", {"canary_seconds": None})
    (folder / "serving.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "serving", "--settings", str(folder / "serving.yaml"), "--json"]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        yield Server(process, json.loads(line))
    finally:
        process.kill()
        process.communicate()


_TORCH_FREE = """
import json, os, signal, sys, threading, urllib.request
from pathlib import Path
from serving.server import serve
from serving.settings import ServingSettings

def ask(running):
    def post(path, **query):
        request = urllib.request.Request(running.url + path, json.dumps(query).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))
    vector = [1.0] * int(sys.argv[2])
    hits = post("v1/search", vector=vector, k=3)["hits"]
    exact = post("v1/search", vector=vector, k=3, exact=True)["hits"]
    reranked = [post("v1/search", id=3, k=3, rerank=name)["hits"] for name in ("k_reciprocal", "diffusion")]
    added = post("v1/items", vector=vector)
    found = post("v1/search", vector=vector, k=1)["hits"][0]["id"] == added["id"]
    print(json.dumps({"num_hits": [len(hits), len(exact), *map(len, reranked)], "found": found,
                      "loaded": sorted({"torch", "faiss", "timm"} & sys.modules.keys())}), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

settings = ServingSettings.model_validate(
    {"index": sys.argv[1], "port": 0, "allows_writes": True, "engine": {"vectors_only": sys.argv[3] == "True"}})
serve(settings, on_ready=lambda running: threading.Thread(target=ask, args=(running,)).start())
"""


@pytest.mark.parametrize("kind", ["without an encoder", "with one that is left out"])
def test_a_server_of_vectors_only_never_imports_torch(
    own_index: Path, small_index: SmallIndex, tmp_path: Path, kind: str
) -> None:
    index, dim = own_index, DIM
    if kind == "with one that is left out":
        index, dim = tmp_path / "copy", 512
        shutil.copytree(small_index.index, index)
    command = [sys.executable, "-c", _TORCH_FREE, str(index), str(dim), str(index != own_index)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["num_hits"] == [3, 3, 3, 3]
    assert told["found"]
    assert "torch" not in told["loaded"]
    assert "timm" not in told["loaded"]


def test_a_stopped_server_answers_what_it_has_begun_and_ends_cleanly(small_index: SmallIndex, tmp_path: Path) -> None:
    large = picture_of((9, 99, 200), side=6000, file_format="PNG")  # takes a good part of a second
    with serving(tmp_path, small_index.index) as server:
        answers: list[httpx2.Response] = []

        def ask() -> None:
            with httpx2.Client(base_url=server.url, timeout=60) as client:
                answers.append(client.post("/v1/search", files={"image": large}))

        client = threading.Thread(target=ask)
        client.start()
        wait_for_metric(server.url, "lookalike_requests_in_progress 2.0")  # that, and the one for the metrics
        server.process.send_signal(signal.SIGTERM)
        client.join()
        assert [answer.status_code for answer in answers] == [200]
        assert server.process.wait(timeout=30) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(server.url + "livez")
    assert "Traceback" not in (tmp_path / "log").read_text()


def wait_for_metric(url: str, line: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if line in httpx2.get(url + "metrics").text.splitlines():
            return
    raise AssertionError(f"{line} was never told")


def test_several_processes_share_a_port_and_changes_and_are_replaced_when_they_die(
    own_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = unit(900).tolist()
    monkeypatch.setenv("LOOKALIKE_LOG", "DEBUG")  # each request is a line
    with serving(tmp_path, own_index, num_processes=2, observability={"log_format": "json"}) as server:
        first, second = server.workers
        added = httpx2.post(server.url + "v1/items", json={"vector": vector}).json()["id"]
        for _ in range(20):  # new connections, which either of them takes
            [hit] = httpx2.post(server.url + "v1/search", json={"vector": vector, "k": 1}).json()["hits"]
            assert hit["id"] == added
            headers = {"content-type": "multipart/form-data; boundary=b"}
            malformed = httpx2.post(server.url + "v1/search", content=b"--bad", headers=headers)
            assert malformed.status_code == 400
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 60
        while first in server.workers or len(server.workers) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert second in server.workers
        [hit] = httpx2.post(server.url + "v1/search", json={"vector": vector, "k": 1}).json()["hits"]
        assert hit["id"] == added
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=40) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert f"process {first} ended with code -9" in [line["message"] for line in lines]
    assert {line["process"] for line in lines if "request_id" in line} >= {first, second}
    assert "python_multipart" not in {line["logger"].partition(".")[0] for line in lines}


def test_what_is_wrong_with_an_index_is_told_once_whatever_the_number_of_processes(
    own_index: Path, tmp_path: Path
) -> None:
    (own_index / "v0002" / "vectors.npy").write_bytes(b"")
    command = [sys.executable, "-m", "serving", "--index", str(own_index), "--port", "0", "--workers", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 5
    assert result.stderr.count("cannot be read") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_server_loses_no_acknowledged_write(own_index: Path, tmp_path: Path, num_processes: int) -> None:
    acknowledged: list[int] = []
    deleted: list[int] = []
    with serving(tmp_path, own_index, num_processes=num_processes) as server:
        workers = server.workers

        async def write() -> None:
            limits = httpx2.Limits(max_connections=6)
            async with httpx2.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:

                async def add(seed: int) -> None:
                    with contextlib.suppress(httpx2.TransportError):
                        answer = await client.post("/v1/items", json={"vector": unit(seed).tolist()})
                        acknowledged.append(answer.json()["id"])
                        if len(acknowledged) == 15:
                            server.process.kill()
                            for pid in workers:
                                os.kill(pid, signal.SIGKILL)

                async def delete(identifier: int) -> None:
                    with contextlib.suppress(httpx2.TransportError):
                        assert (await client.delete(f"/v1/items/{identifier}")).status_code == 204
                        deleted.append(identifier)

                writes = [delete(n) if n % 3 == 0 and n < NUM_VECTORS else add(1000 + n) for n in range(90)]
                await asyncio.gather(*writes)

        asyncio.run(write())
    assert 15 <= len(acknowledged) < 60
    with serving(tmp_path, own_index) as server:
        for identifier in acknowledged:
            assert httpx2.get(f"{server.url}v1/items/{identifier}").status_code == 200
        for identifier in deleted:
            assert httpx2.get(f"{server.url}v1/items/{identifier}").status_code == 404


def test_processes_end_with_the_one_that_started_them(own_index: Path, tmp_path: Path) -> None:
    with serving(tmp_path, own_index, num_processes=2) as server:
        workers = server.workers
        assert len(workers) == 2
        server.process.kill()
        server.process.wait()
        until = time.monotonic() + 30
        while any(is_alive(pid) for pid in workers):
            assert time.monotonic() < until
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("num_requests", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_request_fails_during_swaps_rollbacks_changes_and_compaction(
    own_index: Path, tmp_path: Path, num_requests: int
) -> None:
    """Two processes; swaps come from either of them and from a program beside them."""

    async def run(server: Server) -> tuple[int, set[str]]:
        is_over = asyncio.Event()
        served_versions: set[str] = set()
        limits = httpx2.Limits(max_connections=12)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:

            async def search(share: int) -> int:
                done = 0
                while done < share or not is_over.is_set():
                    seed = done % NUM_VECTORS
                    answer = await client.post("/v1/search", json={"vector": unit(seed).tolist(), "k": 3})
                    assert answer.status_code == 200, answer.text
                    found = answer.json()
                    served_versions.add(found["index_version"])
                    assert found["hits"][0]["id"] == seed
                    assert found["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
                    done += 1
                return done

            async def change() -> None:
                async def post(path: str, **tree: Any) -> Any:
                    answer = await client.post(path, json=tree or None)
                    assert answer.status_code in (200, 201), answer.text
                    return answer.json()

                for round_ in range(4):
                    added = await post("/v1/items", vector=unit(500 + round_).tolist())
                    await post("/v1/indexes:rollback")
                    assert (await client.delete(f"/v1/items/{added['id']}")).status_code == 204
                    await post("/v1/indexes:swap", version="v0002")
                await post("/v1/items", vector=unit(600).tolist())
                await post("/v1/indexes:compact")
                is_over.set()

            counts = await asyncio.gather(*[search(num_requests // 8) for _ in range(8)], change())
        return sum(count for count in counts if count is not None), served_versions

    with serving(tmp_path, own_index, num_processes=2) as server:
        num_done, served_versions = asyncio.run(run(server))
        assert num_done >= num_requests
        assert served_versions == {"v0001", "v0002", "v0003"}
    assert "Traceback" not in (tmp_path / "log").read_text()
    np.testing.assert_array_equal(np.load(own_index / "v0003" / "ids.npy")[:NUM_VECTORS], np.arange(NUM_VECTORS))
