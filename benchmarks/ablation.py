"""Which k, how large a batch, with or without SiMix, and which loss? The paper's questions, on the demo's emoji.

    python benchmarks/ablation.py            # minutes on two cores, prints tables
    python benchmarks/ablation.py --save     # and writes them, with figures, to benchmarks/results/ablation*

A new projection over a frozen backbone is trained with each (`frozen_backbone.py`), and measured on classes it has
never seen. Within a table all but the named thing stays the same. Batches are compared twice: after the same number of
steps, where a larger batch has seen more pictures, and after the same number of pictures, where a smaller one took
more steps.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from frozen_backbone import (
    IMAGES_PER_CLASS,
    NUM_VERSIONS,
    Features,
    embed_emoji,
    footer,
    parse_arguments,
    train_projection,
    unseen_hit_rate,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.loss_settings import ContrastiveLoss, LossSettings, RecallAtKLoss, SmoothAPLoss
from training.losses import recall_at_k_with_gradient, surrogate_floor

RESULT = Path(__file__).parent / "results" / "ablation_cpu.md"
BATCH_SIZE = 512
BATCH_SIZES = (64, 128, 256, 512, 1024, 2048)
NUM_STEPS = 100
DEFAULT_KS = (1, 2, 4, 8, 16)
KS = ((1,), (1, 2), (1, 2, 4), (1, 2, 4, 8), DEFAULT_KS, (4,), (16,))
LOSSES: dict[str, LossSettings] = {
    "RS@k": RecallAtKLoss(),
    "RS@k with SiMix": RecallAtKLoss(mixes_similarities=True),
    "Smooth-AP": SmoothAPLoss(),
    "Smooth-AP with SiMix": SmoothAPLoss(mixes_similarities=True),
    "contrastive, margin .5": ContrastiveLoss(),
    "contrastive, margin .3": ContrastiveLoss(negative_margin=0.3),
}


class Trials:
    """Runs over seeds; nothing is run twice."""

    def __init__(self, features: Features, *, num_seeds: int) -> None:
        self._features = features
        self._num_seeds = num_seeds
        self._cells: dict[tuple[str, int, int], str] = {}
        self.curve: list[dict[str, float]] = []  # of the first run: the defaults

    def cell(self, loss: LossSettings, *, batch_size: int, num_steps: int) -> str:
        """hit_rate@1 of the unseen classes: mean ± standard deviation over seeds."""
        key = (loss.model_dump_json(), batch_size, num_steps)
        if key not in self._cells:
            runs = [
                train_projection(self._features, loss, batch_size=batch_size, num_steps=num_steps, seed=seed)
                for seed in range(self._num_seeds)
            ]
            self.curve = self.curve or runs[0].steps
            rates = [run.hit_rate_at_1 for run in runs]
            deviation = statistics.stdev(rates) if len(rates) > 1 else float("nan")
            self._cells[key] = f"{statistics.mean(rates):.3f} ± {deviation:.3f}"
            seconds = sum(run.seconds for run in runs)
            print(f"{key}: {self._cells[key]}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return self._cells[key]


def main() -> None:
    arguments = parse_arguments(__doc__, result=RESULT)
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    num_steps, num_seeds = (3, 1) if arguments.quick else (NUM_STEPS, arguments.seeds)
    features = embed_emoji(arguments.folder, num_versions=2 if arguments.quick else NUM_VERSIONS)
    trials = Trials(features, num_seeds=num_seeds)
    text = "\n".join(
        [
            "# K, batch size, SiMix and loss",
            "",
            f"hit_rate@1 of the unseen classes of the demo's emoji, mean ± deviation over {num_seeds} seeds; a "
            f"projection to 128 dimensions over a frozen backbone, whose own features have "
            f"{unseen_hit_rate(features.test, features.test_labels):.3f}. Batch {BATCH_SIZE}, {num_steps} steps, one "
            "learning rate for all, unless said otherwise.",
            "",
            *k_table(trials, num_steps=num_steps),
            "",
            *loss_table(trials, num_steps=num_steps),
            "",
            *batch_table(trials, num_steps=num_steps),
            "",
            "![Sigmoids, gradient, surrogate](ablation_sigmoids.png)",
            "",
            "![Surrogate beside the metric](ablation_surrogate.png)",
            "",
            *footer(time.perf_counter() - started, threads=arguments.threads),
        ]
    )
    print(text)
    if arguments.save:
        RESULT.write_text(text + "\n", encoding="utf-8")
        save_sigmoids(RESULT.with_name("ablation_sigmoids.png"))
        save_surrogate(trials.curve, RESULT.with_name("ablation_surrogate.png"))


def k_table(trials: Trials, *, num_steps: int) -> list[str]:
    ordered = sorted(KS, key=lambda ks: ks != DEFAULT_KS)  # the defaults first, for the curve
    cells = {ks: trials.cell(RecallAtKLoss(ks=ks), batch_size=BATCH_SIZE, num_steps=num_steps) for ks in ordered}
    return ["| K | hit_rate@1 |", "|---|---|", *(f"| {', '.join(map(str, ks))} | {cells[ks]} |" for ks in KS)]


def loss_table(trials: Trials, *, num_steps: int) -> list[str]:
    rows = [
        f"| {name} | {trials.cell(loss, batch_size=BATCH_SIZE, num_steps=num_steps)} |" for name, loss in LOSSES.items()
    ]
    return ["| loss | hit_rate@1 |", "|---|---|", *rows]


def batch_table(trials: Trials, *, num_steps: int) -> list[str]:
    lines = [
        f"| batch | RS@k, {num_steps} steps | with SiMix | RS@k, {num_steps * BATCH_SIZE:,} pictures |",
        "|---|---|---|---|",
    ]
    for size in BATCH_SIZES:
        same_steps = trials.cell(RecallAtKLoss(), batch_size=size, num_steps=num_steps)
        mixed = trials.cell(RecallAtKLoss(mixes_similarities=True), batch_size=size, num_steps=num_steps)
        same_pictures = trials.cell(RecallAtKLoss(), batch_size=size, num_steps=max(1, num_steps * BATCH_SIZE // size))
        lines.append(f"| {size:,} | {same_steps} | {mixed} | {same_pictures} |")
    return lines


def save_sigmoids(path: Path) -> None:
    """The sigmoid of k at several temperatures, and what a rank's gradient is for it and for the mean over K."""
    ranks = np.linspace(1, 40, 400)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    steps, gradients = figure.subplots(1, 2)
    for temperature in (0.5, 1.0, 4.0, 16.0):
        steps.plot(ranks, sigmoid((8 - ranks) / temperature), label=f"temperature {temperature:g}")
        gradients.plot(ranks, gradient_of_rank(ranks, DEFAULT_KS, temperature), label=f"temperature {temperature:g}")
    steps.plot(ranks, ranks <= 8, color="black", linewidth=0.8, label="rank ≤ 8")
    steps.set(xlabel="rank of a positive", ylabel="counted for k = 8")
    gradients.set(
        xlabel="rank of a positive", ylabel="gradient, mean over K = 1, 2, 4, 8, 16", yscale="log", ylim=(1e-6, 1)
    )
    for axes in (steps, gradients):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-values)))


def gradient_of_rank(ranks: np.ndarray, ks: Sequence[int], temperature: float) -> np.ndarray:
    """Size of the derivative of the mean over `ks` of sigmoid((k - rank) / temperature) by the rank."""
    counted = [sigmoid((k - ranks) / temperature) for k in ks]
    return np.mean([part * (1 - part) / temperature for part in counted], axis=0)


def save_surrogate(steps: Sequence[dict[str, float]], path: Path) -> None:
    """Left: what the loss says and what it stands for, over one run. Right: both, from a perfect ranking to noise."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    course, agreement = figure.subplots(1, 2)
    for name, label in (("loss_above_floor", "loss above its floor"), ("live_fraction", "live queries")):
        course.plot([step[name] for step in steps], label=label)
    course.plot([1 - step["hit_rate_at_1"] for step in steps], label="1 - hit_rate@1 of the batch")
    course.set(xlabel="step", ylim=(0, 1))
    for k in (1, 4, 16):
        surrogate, metric = surrogate_and_metric(k)
        agreement.plot(metric, surrogate, "o-", markersize=3, label=f"k = {k}")
    agreement.set(xlabel="recall@k lost against a perfect ranking", ylabel="loss of this k, above its floor")
    for axes in (course, agreement):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def surrogate_and_metric(k: int) -> tuple[list[float], list[float]]:
    """(loss above its floor, recall@k lost against a perfect ranking) of 256 embeddings: tight classes to noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) // IMAGES_PER_CLASS
    centres = torch.randn(64, 32, generator=generator)[labels]
    noise = torch.randn(256, 32, generator=generator)
    losses, recalls = [], []
    for share in np.linspace(0.05, 1, 12):  # without any noise a class would be one large tie
        embeddings = torch.nn.functional.normalize((1 - share) * centres + share * noise, dim=1)
        losses.append(float(recall_at_k_with_gradient(embeddings, labels, ks=(k,)).loss))
        recalls.append(recall_of_batch(embeddings, labels, k))
    floor = surrogate_floor(labels, ks=(k,))
    return [loss - floor for loss in losses], [recalls[0] - recall for recall in recalls]


def recall_of_batch(embeddings: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    similarities = embeddings @ embeddings.T
    similarities.fill_diagonal_(-torch.inf)
    found = (labels[similarities.topk(k).indices] == labels[:, None]).sum(1)
    return float((found / (IMAGES_PER_CLASS - 1)).mean())


if __name__ == "__main__":
    main()
