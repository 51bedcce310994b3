"""An untrained projection, a large batch: which queries have a gradient at all, and does a schedule help them?

    python benchmarks/cold_start.py            # minutes on two cores, prints a table
    python benchmarks/cold_start.py --save     # and writes it to benchmarks/results/cold_start_cpu.md

RS@k moves a query only while one of its positives ranks near some k: all others are dead rows. The larger the batch,
the further a positive can be from there. Compared are constant temperatures with those that begin wide and become
narrow, evenly over the first half of the run or by what keeps half of the queries alive. The pictures are the demo's
emoji; see `frozen_backbone.py` for what is trained.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from frozen_backbone import (
    NUM_VERSIONS,
    Features,
    Run,
    embed_emoji,
    footer,
    parse_arguments,
    train_projection,
    unseen_hit_rate,
)

from training.loss_settings import LinearChange, LiveFractionTarget, RecallAtKLoss

RESULT = Path(__file__).parent / "results" / "cold_start_cpu.md"
BATCH_SIZE = 1024
NUM_STEPS = 100


def losses(num_steps: int) -> dict[str, RecallAtKLoss]:
    """The conditions by name."""
    half = num_steps // 2
    return {
        "constant: τ of ranks .01, of k 1": RecallAtKLoss(),
        "constant: τ of k 4": RecallAtKLoss(k_temperature=4.0),
        "constant: τ of ranks .05": RecallAtKLoss(rank_temperature=0.05),
        "τ of k 16 to 1, linear": RecallAtKLoss(k_temperature=LinearChange(start=16, end=1, num_steps=half)),
        "τ of ranks .05 to .01, linear": RecallAtKLoss(
            rank_temperature=LinearChange(start=0.05, end=0.01, num_steps=half)
        ),
        "τ of k 1 to 16, live fraction .5": RecallAtKLoss(
            k_temperature=LiveFractionTarget(target=0.5, lowest=1, highest=16)
        ),
        "τ of k 1 to 16, live fraction .9": RecallAtKLoss(
            k_temperature=LiveFractionTarget(target=0.9, lowest=1, highest=16)
        ),
    }


def main() -> None:
    arguments = parse_arguments(__doc__, result=RESULT)
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    num_steps, num_seeds = (4, 1) if arguments.quick else (NUM_STEPS, arguments.seeds)
    num_versions = 2 if arguments.quick else NUM_VERSIONS
    lines = []
    for has_random_weights, title in ((False, "ImageNet's weights"), (True, "random weights")):
        features = embed_emoji(arguments.folder, num_versions=num_versions, has_random_weights=has_random_weights)
        rate = unseen_hit_rate(features.test, features.test_labels)
        lines += [
            f"## Over a backbone with {title}",
            "",
            f"Its own features have a hit_rate@1 of {rate:.3f}.",
            "",
            *table(features, num_steps=num_steps, num_seeds=num_seeds),
            "",
        ]
    text = "\n".join(
        [
            "# RS@k from an untrained projection: constant temperatures and schedules",
            "",
            f"Batch {BATCH_SIZE}, {num_steps} steps, {num_seeds} seeds, the demo's emoji at 64 px, frozen backbone. "
            "Live: share of the batch's queries that have a gradient, mean over seeds, at the step named. hit_rate@1 "
            "is of the unseen classes after the last step: mean and, in brackets, least and largest of the seeds.",
            "",
            *lines,
            *footer(time.perf_counter() - started, threads=arguments.threads),
        ]
    )
    print(text)
    if arguments.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


def table(features: Features, *, num_steps: int, num_seeds: int) -> list[str]:
    moments = sorted({0, num_steps // 12, num_steps // 6, num_steps // 2, num_steps - 1})
    lines = [
        "| temperatures | " + " | ".join(f"live, step {moment}" for moment in moments) + " | hit_rate@1 |",
        "|---" * (len(moments) + 2) + "|",
    ]
    for name, loss in losses(num_steps).items():
        runs = [
            train_projection(features, loss, batch_size=BATCH_SIZE, num_steps=num_steps, seed=seed)
            for seed in range(num_seeds)
        ]
        rates = [run.hit_rate_at_1 for run in runs]
        live = " | ".join(f"{live_fraction(runs, moment):.2f}" for moment in moments)
        lines.append(f"| {name} | {live} | {statistics.mean(rates):.3f} [{min(rates):.3f}, {max(rates):.3f}] |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def live_fraction(runs: list[Run], step: int) -> float:
    return statistics.mean(run.steps[step]["live_fraction"] for run in runs)


if __name__ == "__main__":
    main()
