"""Runs a function on real gloo processes: one forkserver with torch preloaded, so a world costs under a second."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from lookalike.collectives import process_group
from lookalike.world import World

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "faiss", "lookalike.collectives", "training.losses", "indexing.building.build"]
)


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """Calls `function(world, *arguments)` on every rank and returns the results in rank order."""
    port = free_port()
    queue = _context.SimpleQueue()
    processes = [
        _context.Process(target=_run_rank, args=(queue, function, rank, num_ranks, port, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    answers = [queue.get() for _ in processes]
    for process in processes:
        process.join(timeout=60)
    failures = [text for _, text, _ in answers if text]
    if failures:
        raise AssertionError("\n".join(failures))
    return [result for _, _, result in sorted(answers, key=lambda answer: answer[0])]


def _run_rank(queue: Any, function: Callable[..., Any], rank: int, num_ranks: int, port: int, arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(num_ranks))
    torch.set_num_threads(1)
    try:
        world = World(rank=rank, size=num_ranks, local_rank=rank)
        with process_group(world):
            result = function(world, *arguments)
        queue.put((rank, "", result))
    except BaseException:
        queue.put((rank, f"rank {rank}:\n{traceback.format_exc()}", None))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
