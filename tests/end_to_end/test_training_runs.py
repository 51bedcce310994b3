"""`lookalike train` as a user runs it: killed and resumed, alone and under torchrun."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lookalike.events import read_events

NUM_STEPS = 12
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training")


@pytest.fixture
def config(tmp_path: Path, shards_folder: Path) -> Path:
    """Dropout and stochastic depth, mixing, an average, a controlled temperature, validation: with state or chance."""
    tree = {
        "shards": str(shards_folder),
        "run": str(tmp_path / "run"),
        "num_steps": NUM_STEPS,
        "batch": {"classes_per_batch": 4, "images_per_class": 4, "chunk_size": 5, "num_kept_chunks": 1},
        "encoder": {
            "backbone": "resnet10t",
            "projection_dim": 16,
            "drop_rate": 0.2,
            "drop_path_rate": 0.1,
            "input": {"size": 32},
        },
        "loss": {
            "ks": [1, 2, 4],
            "rank_temperature": 0.05,
            "k_temperature": {"schedule": "live_fraction", "lowest": 0.5, "highest": 4.0, "target": 0.7},
            "mixes_similarities": True,
            "mixing": {"share": 0.8, "beta": [2.0, 2.0]},
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "max_gradient_norm": 1.0},
        "average_decay": 0.9,
        "augmentation": yaml.safe_load(resources.files("demo").joinpath("recipe.yaml").read_text())["augmentation"],
        "validation": {"class_share": 0.35, "steps_between": 3},  # two of six classes, by their names
        "steps_per_checkpoint": 2,
        "writes_checkpoints_in_background": True,
        "num_workers": 1,
        "num_threads": 2,
        "seed": 3,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, *overrides: str, launcher: tuple[str, ...] = ("-m", "training")) -> str:
    result = subprocess.run(
        [sys.executable, *launcher, str(config), *overrides], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the last step; the finished encoder may be an earlier one, the best by validation."""
    folders = sorted((run / "checkpoints").glob("step_*"))
    return load_file(folders[-1] / "encoder" / "encoder.safetensors")


def finished_encoder(run: Path) -> bytes:
    return (run / "encoder" / "encoder.safetensors").read_bytes()


def kill_after_step(config: Path, run: Path, step: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "training", str(config), f"run={run}"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not any(event["step"] >= step for event in read_events(run / "events-rank0.jsonl", "step")):
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    # Loader processes must not outlive a training process, however it ends.
    deadline = time.monotonic() + 30
    while living := processes_of_session(process.pid):
        assert time.monotonic() < deadline, f"left behind: {living}"
        time.sleep(0.1)


def processes_of_session(session: int) -> list[str]:
    """Command lines of all living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, _, _, own_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, ValueError):
            continue
    return found


# Of a job whose processes are all signalled, the workers have to go on, too, until the step is done.
@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_sigterm_ends_training_cleanly_and_says_how_to_go_on(
    config: Path, tmp_path: Path, kill: Callable[[int, int], None]
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "training", str(config), "num_steps=500"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not read_events(run / "events-rank0.jsonl", "step"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # ends only when nobody holds the pipe any more
    assert process.returncode == 143
    assert errors.strip().splitlines()[-1].endswith("Run the same command again to continue.")
    num_done = read_events(run / "events-rank0.jsonl", "step")[-1]["step"] + 1
    assert (run / "checkpoints" / f"step_{num_done:06d}").exists(), "the step that was going on is finished and saved"


def test_a_run_killed_at_random_steps_ends_with_the_bits_of_an_undisturbed_one(config: Path, tmp_path: Path) -> None:
    train(config, f"run={tmp_path / 'undisturbed'}")
    killed = tmp_path / "killed"
    # One checkpoint is written in the background at a time: that of step 2 is whole once that of step 4 has begun.
    first = random.Random(os.urandom(8)).randrange(4, NUM_STEPS - 4)
    for step in (first, first + 3):
        kill_after_step(config, killed, step)
        assert not (killed / "encoder").exists()
    train(config, f"run={killed}", "num_workers=0")
    steps = [event["step"] for event in read_events(killed / "events-rank0.jsonl", "step")]
    assert steps.count(0) == 1, "it must have resumed, not begun again"
    expected, found = weights(tmp_path / "undisturbed"), weights(killed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs after kills at steps {first} and {first + 3}"
    assert finished_encoder(killed) == finished_encoder(tmp_path / "undisturbed")


def test_two_processes_train_the_encoder_of_one(config: Path, tmp_path: Path) -> None:
    # Without dropout, whose masks depend on the chunks of a process; the learning rate is lowered since Adam turns
    # a relative rounding difference of a vanishing gradient into a step of the learning rate.
    plain = (
        "num_steps=3",
        "encoder.drop_rate=0",
        "encoder.drop_path_rate=0",
        "average_decay=null",
        "optimizer.lr=1e-4",
    )
    train(config, *plain, f"run={tmp_path / 'one'}")
    train(config, *plain, f"run={tmp_path / 'two'}", launcher=TORCHRUN)
    losses = [
        [event["loss"] for event in read_events(tmp_path / run / "events-rank0.jsonl", "step")]
        for run in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    norms = [
        [event["gradient_norm"] for event in read_events(tmp_path / run / "events-rank0.jsonl", "step")]
        for run in ("one", "two")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        if value.is_floating_point():
            # Three steps of at most 1e-4 each; a wrong factor or lost gradient would show as differences of that size.
            assert float((two[name] - value).abs().mean()) < 1e-5, name


def test_gradients_of_two_processes_are_verified_from_the_command_line(config: Path, tmp_path: Path) -> None:
    lines = train(config, "--verify-gradients", "backend.name=ddp", launcher=TORCHRUN).splitlines()
    verdicts = [line for line in lines if line.startswith("passed: backend ddp over 2 processes in ")]
    assert [line.split(" in ")[1].split(",")[0] for line in verdicts] == ["float32", "float64"]
    assert not (tmp_path / "run").exists()
