"""A server as people start it: a process of its own."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml


def new_key(keys: Path) -> str:
    """A key that may search, and no more, in the file `keys`, which is made where there is none."""
    command = [sys.executable, "-m", "serving", "keys", "add", "reader", "--keys", str(keys)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def running_server(folder: Path, index: Path, **settings: object) -> Iterator[str]:
    """Its address, until the block ends; `folder` is for its settings file."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"index": str(index), "port": 0, **settings}))
    command = [sys.executable, "-m", "serving", "--settings", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"]
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
