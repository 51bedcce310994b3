"""Does memory stay flat as the batch grows, and how much time do kept graphs save?

    python benchmarks/large_batch_step.py            # six minutes on two cores, prints two tables
    python benchmarks/large_batch_step.py --save     # and writes them to benchmarks/results/large_batch_step_cpu.md

One step is: embed the batch, RS@k, gradients of all weights; no optimizer. The plain step is one forward and one
backward pass over the whole batch.

Memory is how far the process's anonymous resident size rises above its start, at which encoder, gradients and pixels
are in place. Every figure comes from a process of its own, whose allocator (glibc) has one arena and returns blocks
above 1 MB to the system at once, so that live tensors are counted, not the allocator's reserves. The loss has its peak
between the passes, while no chunk is at work; what it takes is measured alone, too.

Each process runs two steps: the peak is of both, the time of the quicker one, as the first also pays for new memory.
Times of the second table are of processes with the allocator's defaults, the least of some rounds; a round runs every
way once, so other work on the machine hits all alike.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings
from training.large_batch import backward_large_batch, freeze_batch_norm, num_chunks
from training.losses import recall_at_k_with_gradient
from training.memory_budget import ChunkPlan, choose_chunks

RESULT = Path(__file__).parent / "results" / "large_batch_step_cpu.md"
DIM = 128
BATCHES = (512, 2048, 8192, 16384)
CHUNK_SIZE = 64
# A plain step that would need more is left out.
MAX_PLAIN_BYTES = 2e9
LIVE_TENSORS_ONLY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    text = report(arguments)
    print(text)
    if arguments.save:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--size", type=int, default=32, help="side of a picture in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hybrid-batch", type=int, default=1024)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.4, 0.8], help="in GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"write the tables to {RESULT.name} too")
    # What one process measures; set by the process that prints the tables.
    parser.add_argument("--measure", choices=["two-pass", "plain", "loss", "plan"], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def report(arguments: argparse.Namespace) -> str:
    flat, bytes_per_picture = flat_table(arguments)
    hybrid = hybrid_table(arguments)
    return "\n".join(
        [
            "# Memory and time of the two-pass step on CPU",
            "",
            f"{arguments.backbone}, {arguments.size} x {arguments.size} pixels, {DIM} dimensions, RS@k with 4 images "
            f"per class, float32, chunks of {CHUNK_SIZE}. MB are 10^6 bytes.",
            "",
            "## Memory beyond weights, gradients and pixels, no graph kept",
            "",
            *flat,
            "",
            f"A plain step takes {bytes_per_picture / 1e6:.2f} MB per picture; above {MAX_PLAIN_BYTES / 1e9:.0f} GB "
            "it was not run. `beyond` is the two-pass peak less embeddings and gradient. The loss has its own peak, "
            "between the passes. Seconds are with the allocator of these measurements, which costs time.",
            "",
            f"## Time saved by kept graphs, batch {arguments.hybrid_batch}",
            "",
            *hybrid,
            "",
            "Budgets cover graphs and one chunk in flight; the plan fills them. Its peak is measured with live tensors "
            f"only, time with the allocator's defaults, the least of {arguments.rounds} rounds.",
            "",
            f"{processor()}, {arguments.threads} threads. Load at the end: {os.getloadavg()[0]:.1f}. "
            f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}, "
            f"commit {commit()}.",
            f"Command: `{' '.join(['python', f'benchmarks/{Path(__file__).name}', *sys.argv[1:]])}`",
        ]
    )


def flat_table(arguments: argparse.Namespace) -> tuple[list[str], float]:
    lines = [
        "| batch | embeddings and their gradient, MB | loss alone, MB | two-pass, MB | beyond, MB | of batch 512 "
        "| plain, MB | two-pass, s | plain, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = bytes_per_picture = 0.0
    for batch in BATCHES:
        lean = in_child(arguments, "two-pass", batch, environment=LIVE_TENSORS_ONLY)
        alone = in_child(arguments, "loss", batch, environment=LIVE_TENSORS_ONLY)
        embeddings = 2 * batch * DIM * 4
        beyond = lean["bytes"] - embeddings
        first = first or beyond
        plain = {"bytes": float("nan"), "seconds": float("nan")}
        if not bytes_per_picture or bytes_per_picture * batch < MAX_PLAIN_BYTES:
            plain = in_child(arguments, "plain", batch, environment=LIVE_TENSORS_ONLY)
            bytes_per_picture = plain["bytes"] / batch
        lines.append(
            f"| {batch:,} | {embeddings / 1e6:.1f} | {alone['bytes'] / 1e6:.1f} | {lean['bytes'] / 1e6:.1f} "
            f"| {beyond / 1e6:.1f} | {beyond / first:.2f} | {cell(plain['bytes'] / 1e6)} | {lean['seconds']:.1f} "
            f"| {cell(plain['seconds'], 1)} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines, bytes_per_picture


def hybrid_table(arguments: argparse.Namespace) -> list[str]:
    batch = arguments.hybrid_batch
    count = num_chunks(batch, CHUNK_SIZE)
    plans = [ChunkPlan(**in_child(arguments, "plan", batch, budget=budget)) for budget in arguments.budgets]
    kept = {0: "none"} | {plan.num_kept_chunks: f"{plan.budget_bytes / 1e6:.0f}" for plan in plans}
    seconds: dict[int, list[float]] = {number: [] for number in kept}
    plain_seconds = []
    for _ in range(arguments.rounds):
        for number in kept:
            seconds[number].append(in_child(arguments, "two-pass", batch, kept=number)["seconds"])
        plain_seconds.append(in_child(arguments, "plain", batch)["seconds"])
    lines = ["| budget, MB | graphs kept | peak, MB | seconds | of no graph kept |", "|---|---|---|---|---|"]
    for number, budget in sorted(kept.items()):
        lean = in_child(arguments, "two-pass", batch, kept=number, environment=LIVE_TENSORS_ONLY)
        lines.append(
            f"| {budget} | {number} of {count} | {lean['bytes'] / 1e6:.0f} | {min(seconds[number]):.2f} "
            f"| {min(seconds[number]) / min(seconds[0]):.2f} |"
        )
    lean = in_child(arguments, "plain", batch, environment=LIVE_TENSORS_ONLY)
    lines.append(
        f"| plain step | | {lean['bytes'] / 1e6:.0f} | {min(plain_seconds):.2f} "
        f"| {min(plain_seconds) / min(seconds[0]):.2f} |"
    )
    return lines


def cell(value: float, digits: int = 0) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def in_child(
    arguments: argparse.Namespace,
    one: str,
    batch: int,
    *,
    kept: int = 0,
    budget: float = 0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", one, "--batch", str(batch), "--kept", str(kept)]
    command += ["--budget", str(budget)]
    for name in ("backbone", "size", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    own = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
    finished = subprocess.run(command, env=os.environ | own, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = create_encoder(EncoderSettings(backbone=arguments.backbone, projection_dim=DIM)).train()
    torch.set_num_threads(arguments.threads)
    freeze_batch_norm(encoder)
    shape = (3, arguments.size, arguments.size)
    if arguments.measure == "plan":
        plan = choose_chunks(
            encoder, shape, arguments.batch, budget_bytes=int(arguments.budget * 1e9), chunk_size=CHUNK_SIZE
        )
        return {name: getattr(plan, name) for name in ChunkPlan.__dataclass_fields__}
    pixels = torch.randint(0, 256, (arguments.batch, *shape), dtype=torch.uint8)
    embeddings = torch.nn.functional.normalize(torch.randn(arguments.batch, DIM), dim=1)

    def step(pixels: Tensor) -> None:
        if arguments.measure == "loss":
            score(embeddings[: len(pixels)])
        elif arguments.measure == "plain":
            part = encoder(pixels)
            part.backward(score(part.detach())[1])
        else:
            backward_large_batch(encoder, pixels, score, chunk_size=CHUNK_SIZE, num_kept_chunks=arguments.kept, seed=0)

    step(pixels[: 2 * CHUNK_SIZE])  # gradients exist, code is loaded
    with PeakMemory() as memory:
        seconds = [seconds_of_step(step, pixels) for _ in range(2)]
    return {"seconds": min(seconds), "bytes": memory.num_bytes}


def seconds_of_step(step: Callable[[Tensor], None], pixels: Tensor) -> float:
    started = time.perf_counter()
    step(pixels)
    return time.perf_counter() - started


def score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.arange(len(embeddings)) // 4
    result = recall_at_k_with_gradient(embeddings, labels)
    assert result.gradient is not None
    return result.loss, result.gradient


class PeakMemory:
    """`num_bytes`: how far the process's anonymous memory rose above its start, by the kernel's own high-water mark.

    The mark is of all resident memory; what files took meanwhile (code loaded late) is taken off.
    """

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the mark starts again from the present size
        self._start = resident_bytes("VmRSS") - resident_bytes("RssFile")
        return self

    def __exit__(self, *_: object) -> None:
        self.num_bytes = resident_bytes("VmHWM") - resident_bytes("RssFile") - self._start


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.machine()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "none yet"


if __name__ == "__main__":
    main()
