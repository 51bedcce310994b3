"""Training on two nodes of two processes each, one of which is killed: `lookalike launch` as a user runs it.

The nodes are network namespaces joined by a virtual cable, where the machine allows them, and two agents side by side.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lookalike.events import read_events
from tests.gloo_ranks import free_port

NUM_STEPS = 40
STEPS_PER_CHECKPOINT = 4
PROCESSES_PER_NODE = 2
NAMESPACES = ("lookalike-a", "lookalike-b")
DEVICES = ("lk-a", "lk-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Node:
    """Where an agent of torchrun runs: a prefix of its command, its address, and what gloo must be told."""

    address: str
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def remove_namespaces() -> None:
    for name in NAMESPACES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


@contextmanager
def namespaces() -> Iterator[list[Node]]:
    """Two hosts with a cable between them; skips the test where the machine allows none."""
    try:
        remove_namespaces()  # of a test that was killed
        for name in NAMESPACES:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "lk-a",
            "netns",
            NAMESPACES[0],
            "type",
            "veth",
            "peer",
            "name",
            "lk-b",
            "netns",
            NAMESPACES[1],
        )
        for name, device, address in zip(NAMESPACES, DEVICES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove_namespaces()
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', None) or error}")
    try:
        yield [
            Node(address, ("ip", "netns", "exec", name), {"GLOO_SOCKET_IFNAME": device})
            for name, device, address in zip(NAMESPACES, DEVICES, ADDRESSES, strict=True)
        ]
    finally:
        remove_namespaces()


@contextmanager
def local_agents() -> Iterator[list[Node]]:
    yield [Node("127.0.0.1"), Node("127.0.0.1")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards_folder: Path) -> Path:
    tree = {
        "shards": str(shards_folder),
        "run": "run",
        "num_steps": NUM_STEPS,
        # Three steps are an epoch of six classes.
        "batch": {"classes_per_batch": 2, "images_per_class": 4, "chunk_size": 1, "num_kept_chunks": 1},
        "encoder": {"backbone": "resnet10t", "projection_dim": 16, "drop_rate": 0.2, "input": {"size": 32}},
        "loss": {"ks": [1, 2], "rank_temperature": 0.05, "mixes_similarities": True},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "average_decay": 0.9,
        "steps_per_checkpoint": STEPS_PER_CHECKPOINT,
        "num_workers": 1,
        "num_threads": 1,
    }
    path = tmp_path_factory.mktemp("two_nodes") / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def training(nodes: list[Node], config: Path, run: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The same command on every node, but for its place in it; agents that are left are ended."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    with ExitStack() as stack:
        agents = []
        for index, node in enumerate(nodes):
            log = stack.enter_context((config.parent / f"{run.name}-node{index}.log").open("w"))
            options = (
                *("--nnodes", str(len(nodes)), "--nproc-per-node", str(PROCESSES_PER_NODE), "--max-restarts", "2"),
                *("--rdzv-id", run.name, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0].address}:{port}"),
                *("--rdzv-conf", f"is_host={str(index == 0).lower()},last_call_timeout=2"),
                *("--local-addr", node.address, "--monitor-interval", "0.2"),
            )
            command = ["-m", "lookalike", "launch", *options, "lookalike", "train", str(config), f"run={run}"]
            agents.append(
                subprocess.Popen(
                    [*node.prefix, sys.executable, *command],
                    env={**environment, **node.environment},
                    stdout=log,
                    stderr=log,
                    text=True,
                )
            )
        try:
            yield agents
        finally:
            for agent in agents:
                agent.terminate()
            for agent in agents:
                agent.wait(timeout=60)


def workers_of(agent: subprocess.Popen[str]) -> list[int]:
    """Process ids of the living workers that a node's agent started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == agent.pid and state != "Z" and any(part.startswith(b"LOCAL_RANK=") for part in environment):
            found.append(int(folder.name))
    return sorted(found)


def steps_of(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run / "events-rank0.jsonl", "step")]


def finish(agents: list[subprocess.Popen[str]], config: Path, run: Path) -> str:
    """Waits for all agents; returns what the first node said."""
    codes = [agent.wait(timeout=200) for agent in agents]
    logs = [(config.parent / f"{run.name}-node{index}.log").read_text() for index in range(len(agents))]
    assert codes == [0] * len(agents), "\n".join(logs)
    return logs[0]


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    """The run folder of a run that nobody disturbs, by four processes of one node."""
    run = config.parent / "undisturbed"
    options = ("--standalone", "--nproc-per-node", str(2 * PROCESSES_PER_NODE))
    command = [sys.executable, "-m", "lookalike", "launch", *options, "lookalike", "train", str(config), f"run={run}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    return run


@pytest.mark.parametrize("place", [namespaces, local_agents], ids=["namespaces", "local agents"])
def test_a_worker_killed_in_mid_epoch_is_restarted_and_changes_no_bit(place, config: Path, undisturbed: Path) -> None:  # type: ignore[no-untyped-def]
    run = config.parent / f"killed-{place.__name__}"
    node, worker = random.Random(os.urandom(8)).choice([(0, 0), (0, 1), (1, 0), (1, 1)])
    victim_step = STEPS_PER_CHECKPOINT + 2  # past the first checkpoint, not at one, and in the middle of an epoch
    with place() as nodes, training(nodes, config, run) as agents:
        deadline = time.monotonic() + 200
        while not any(step >= victim_step for step in steps_of(run)):
            assert time.monotonic() < deadline, "no step came"
            assert all(agent.poll() is None for agent in agents), finish(agents, config, run)
            time.sleep(0.01)
        os.kill(workers_of(agents[node])[worker], signal.SIGKILL)
        log = finish(agents, config, run)
    where = f"after worker {worker} of node {node} was killed"
    assert f"resuming {run} after step" in log, where
    assert "may hang" not in log, "lookalike launch sets what restarts need"
    steps = steps_of(run)
    assert steps.count(0) == 1, "it must have resumed, not begun again"
    assert steps[-1] == NUM_STEPS - 1
    expected, found = (load_file(folder / "encoder" / "encoder.safetensors") for folder in (undisturbed, run))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs {where}"
