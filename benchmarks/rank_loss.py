"""How much CPU time and memory does the fused recall@k loss need, beside a loop over queries that autograd records?

    python benchmarks/rank_loss.py            # two minutes, prints the tables
    python benchmarks/rank_loss.py --sizes    # and one of batches from 512 to 16,384: five minutes more
    python benchmarks/rank_loss.py --save     # and writes them to benchmarks/results/rank_loss_cpu.md

The loop is written from the formulas in the manner of the paper's released code: one query after another, virtual
samples as embeddings, one backward pass at the end. Its cost per query does not depend on the query, so some queries
are measured and scaled to all.

Every figure comes from a process of its own. CPU seconds are of all threads, loss and gradient together, the median of
the repeats. Memory of the loop is what autograd keeps for the backward pass, the bytes of all distinct storages it
saves, and nothing else. Memory of the fused loss is all it takes: the highest resident size (VmHWM) above the size
with inputs in place, in a process whose allocator returns every block above 1 MB to the system at once, so that it
holds live tensors only. That slows it down, hence its time is measured in another process.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from training.losses import mixing_coefficients, mixing_pairs, recall_at_k_with_gradient
from training.losses.similarities import Block, ImageSimilarities

RESULT = Path(__file__).parent / "results" / "rank_loss_cpu.md"
KS = (1, 2, 4, 8, 16)
RANK_TEMPERATURE = 0.01
DATA = {
    "random": "directions at random: an untrained encoder without a bias",
    "early": "all images alike, classes hardly: most similarities near the thresholds",
    "learned": "clusters of a class within looser clusters of eight classes",
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    table = report(arguments)
    print(table)
    if arguments.save:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(table + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--images-per-class", type=int, default=4)
    parser.add_argument("--queries-of-the-loop", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", action="store_true", help="also measure other batch sizes")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name} too")
    # What one process measures; set by the process that prints the table.
    parser.add_argument("--measure", choices=["fused", "loop"], help=argparse.SUPPRESS)
    parser.add_argument("--data", choices=list(DATA), default="random", help=argparse.SUPPRESS)
    parser.add_argument("--mixed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(arguments: argparse.Namespace) -> str:
    batch, dim, images_per_class = arguments.batch, arguments.dim, arguments.images_per_class
    lines = [
        f"# Recall@k loss and gradient on CPU, batch {batch}, {dim} dimensions, {images_per_class} images per class",
        "",
        "| mixing | data | loop, CPU s | fused, CPU s | ratio | loop, MB | fused, MB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mixed in (False, True):
        for data in DATA:
            slow = in_child(arguments, "loop", data, mixed)
            fast = in_child(arguments, "fused", data, mixed)
            lean = in_child(arguments, "fused", data, mixed, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
            lines.append(
                f"| {'yes' if mixed else 'no'} | {data} | {slow['seconds']:.1f} | {fast['seconds']:.2f} "
                f"| {slow['seconds'] / fast['seconds']:.0f} | {slow['megabytes']:.0f} | {lean['megabytes']:.0f} "
                f"| {slow['megabytes'] / lean['megabytes']:.0f} |"
            )
    num_queries = {False: batch, True: batch * (images_per_class + 1) // 2}
    lines += [
        "",
        f"The loop: {arguments.queries_of_the_loop} of {num_queries[False]} queries measured, "
        f"of {num_queries[True]} with mixing, and scaled to all. {largest_difference()}",
        f"Definition `released`, ks {KS}, rank temperature {RANK_TEMPERATURE}, float32.",
        "",
        *(f"* {name}: {description}." for name, description in DATA.items()),
        "",
        *(sizes_table(arguments) if arguments.sizes else []),
        *precision_table(dim),
        f"{processor()}, {arguments.threads} thread(s), median of {arguments.repeats}. "
        f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}, commit {commit()}.",
        f"Command: `{' '.join(['python', f'benchmarks/{Path(__file__).name}', *sys.argv[1:]])}`",
    ]
    return "\n".join(lines)


def sizes_table(arguments: argparse.Namespace) -> list[str]:
    lines = [
        "## Other batch sizes, without mixing",
        "",
        f"| batch | loop, CPU s | {' | '.join(f'{data}, CPU s' for data in DATA)} | fused, MB at most |",
        "|---|---|" + "---|" * (len(DATA) + 1),
    ]
    for batch in (512, 1024, 2048, 4096, 8192, 16384):
        options = argparse.Namespace(**(vars(arguments) | {"batch": batch, "repeats": 3}))
        slow = in_child(options, "loop", "random", False)
        fast = [in_child(options, "fused", data, False)["seconds"] for data in DATA]
        lean = [
            in_child(options, "fused", data, False, MALLOC_MMAP_THRESHOLD_=str(1 << 20))["megabytes"] for data in DATA
        ]
        cells = " | ".join(f"{seconds:.3f}" for seconds in fast)
        lines.append(f"| {batch} | {slow['seconds']:.1f} | {cells} | {max(lean):.0f} |")
    return [*lines, ""]


def precision_table(dim: int) -> list[str]:
    """How far the gradient is off that of float64, in the norm, if similarities are computed in fewer bits."""
    labels = torch.arange(1024) // 4
    precisions: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "float32": (lambda rows: rows, lambda tile: tile),
        "TF32 inputs, float32 out": (tf32, lambda tile: tile),
        "bfloat16 inputs, float32 out": (lambda rows: rows.bfloat16().float(), lambda tile: tile),
        "bfloat16 out: refused": (lambda rows: rows, lambda tile: tile.bfloat16().float()),
    }
    lines = [
        f"## Gradient error by precision of the similarities, batch {len(labels)}",
        "",
        f"| similarities | {' | '.join(DATA)} |",
        "|---|" + "---|" * len(DATA),
    ]
    for name, (of_inputs, of_outputs) in precisions.items():
        errors = []
        for data in DATA:
            embeddings = make_embeddings(labels, dim, data)
            _, exact = fused(embeddings.double(), labels, None)
            with mock.patch.object(ImageSimilarities, "between", narrowed(ImageSimilarities.between, of_outputs)):
                _, gradient = fused(of_inputs(embeddings), labels, None)
            errors.append(float((gradient.double() - exact).norm() / exact.norm()))
        lines.append(f"| {name} | {' | '.join(f'{error:.0e}' for error in errors)} |")
    return [
        *lines,
        "",
        "The loss computes in float32 or float64 and outside autocast, so that the last row cannot happen.",
        "",
    ]


def narrowed(
    between: Callable[[ImageSimilarities, Block, Block], Tensor], narrow: Callable[[Tensor], Tensor]
) -> Callable[[ImageSimilarities, Block, Block], Tensor]:
    return lambda similarities, rows, columns: narrow(between(similarities, rows, columns))


def tf32(values: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that TF32 multiplies."""
    return ((values.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


def in_child(arguments: argparse.Namespace, one: str, data: str, mixed: bool, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", one, "--data", data, *(["--mixed"] if mixed else [])]
    for name in ("batch", "dim", "images_per_class", "queries_of_the_loop", "threads", "repeats"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    environment = (
        os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE"} | environment
    )
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    labels = torch.arange(arguments.batch) // arguments.images_per_class
    embeddings = make_embeddings(labels, arguments.dim, arguments.data)
    mixing = mixing_coefficients(labels, seed=0, step=0) if arguments.mixed else None
    num_samples = len(labels) + (0 if mixing is None else len(mixing))
    queries = torch.linspace(0, num_samples - 1, min(arguments.queries_of_the_loop, num_samples)).long()

    # Small, so that code is loaded but no memory taken.
    few = labels[: 8 * arguments.images_per_class]
    few_coefficients = mixing_coefficients(few, seed=0, step=0) if arguments.mixed else None
    fused(embeddings[: len(few)], few, few_coefficients)
    if arguments.measure == "fused":
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM again from the present size
        before = resident_megabytes("VmRSS")
        seconds = [cpu_seconds(fused, embeddings, labels, mixing) for _ in range(arguments.repeats)]
        return {"seconds": statistics.median(seconds), "megabytes": resident_megabytes("VmHWM") - before}
    scale = num_samples / len(queries)
    seconds = [cpu_seconds(loop, embeddings, labels, mixing, queries) for _ in range(arguments.repeats)]
    megabytes = saved_megabytes(embeddings, labels, mixing, queries[:8]) / 8 * num_samples
    return {"seconds": statistics.median(seconds) * scale, "megabytes": megabytes}


def cpu_seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def saved_megabytes(embeddings: Tensor, labels: Tensor, mixing: Tensor | None, queries: Tensor) -> float:
    """What autograd keeps of each query, without what all of them share: tensors of all samples' embeddings."""
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() < embeddings.nbytes:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loop(embeddings, labels, mixing, queries)
    return sum(sizes.values()) / 1e6


def make_embeddings(labels: Tensor, dim: int, data: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator)

    images = normal(len(labels))
    num_classes = int(labels.max()) + 1
    if data == "early":
        images = normal(1) + 0.3 * normal(num_classes)[labels] + 0.6 * images
    elif data == "learned":
        images = 0.7 * normal(num_classes // 8 + 1)[labels // 8] + normal(num_classes)[labels] + images
    return functional.normalize(images, dim=1)


def fused(embeddings: Tensor, labels: Tensor, mixing: Tensor | None) -> tuple[Tensor, Tensor]:
    result = recall_at_k_with_gradient(
        embeddings, labels, ks=KS, rank_temperature=RANK_TEMPERATURE, definition="released", mixing=mixing
    )
    assert result.gradient is not None
    return result.loss, result.gradient


def loop(embeddings: Tensor, labels: Tensor, mixing: Tensor | None, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the loss that some queries have, and its gradient."""
    leaf = embeddings.clone().requires_grad_()
    samples = leaf
    if mixing is not None:
        first, second = mixing_pairs(labels).unbind(1)
        samples = torch.cat([leaf, mixing[:, None] * leaf[first] + (1 - mixing[:, None]) * leaf[second]])
        labels = torch.cat([labels, labels[first]])
    loss = torch.zeros(())
    for query in queries.tolist():
        similarities = (samples * samples[query]).sum(1)
        members = (labels == labels[query]).nonzero().squeeze(1)
        is_itself = torch.zeros(len(members), len(samples), dtype=torch.bool)
        is_itself[torch.arange(len(members)), members] = True
        above = soft_step(similarities - similarities[members, None], RANK_TEMPERATURE)
        ranks = 1 + above.masked_fill(is_itself, 0).sum(1)
        recalls = [
            (soft_step(k - ranks, 1.0) * (members != query)).sum().clamp(max=k) / min(k, len(members) - 1) for k in KS
        ]
        loss = loss + (1 - torch.stack(recalls).mean()) / len(samples)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def soft_step(difference: Tensor, temperature: float) -> Tensor:
    return 1 / (1 + torch.exp(torch.clamp(-difference / temperature, min=-50, max=50)))


def largest_difference() -> str:
    labels = torch.arange(128) // 4
    embeddings = make_embeddings(labels, 64, "early").double()
    mixing = mixing_coefficients(labels, seed=0, step=0).double()
    expected = loop(embeddings, labels, mixing, torch.arange(len(labels) + len(mixing)))
    actual = fused(embeddings, labels, mixing)
    loss, gradient = (float((one - other).abs().max()) for one, other in zip(actual, expected, strict=True))
    return f"At batch 128 in float64 the two differ by {loss:.0e} in loss, {gradient:.0e} in gradient."


def resident_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.machine()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "none yet"


if __name__ == "__main__":
    main()
