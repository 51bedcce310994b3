"""Batches depend on the plan, the seed and the step: not on workers, world or where one starts."""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.decode import decode_image
from data_pipelines.loader import Batch, augmentation_seeds, evaluation_batches, training_batches
from data_pipelines.settings import AugmentationSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import EvaluationTransform, TrainingTransform
from lookalike.encoder_settings import InputSettings
from lookalike.errors import DataError, ResourceError
from lookalike.world import World

TRANSFORM = TrainingTransform(AugmentationSettings(brightness=0.4, erasing_probability=0.5), 24)


def plan_of(shard_set: ShardSet) -> ClassBalancedBatches:
    return ClassBalancedBatches(
        shard_set.labels, shard_set.rows("train"), classes_per_batch=2, images_per_class=4, seed=5
    )


def batches(shard_set: ShardSet, steps: range, *, num_workers: int = 0, world: World | None = None) -> list[Batch]:
    return list(
        training_batches(
            shard_set,
            plan_of(shard_set),
            TRANSFORM,
            world=world or World(),
            seed=7,
            steps=steps,
            num_workers=num_workers,
        )
    )


def assert_equal_batches(ones: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.step == other.step
        for name in ("rows", "pixels", "labels", "augmentation_seeds"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_batch_holds_what_its_plan_says(shard_set):
    (batch,) = batches(shard_set, range(3, 4))
    np.testing.assert_array_equal(batch.rows, plan_of(shard_set).rows_of_step(3))
    np.testing.assert_array_equal(batch.labels, shard_set.labels[batch.rows])
    assert batch.pixels.shape == (8, 3, 24, 24)
    assert batch.pixels.dtype == torch.uint8
    # Repeats of one picture get augmentations of their own.
    assert len(set(batch.augmentation_seeds.tolist())) == 8


def test_worker_count_and_global_random_state_change_nothing(shard_set):
    alone = batches(shard_set, range(5))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert_equal_batches(alone, batches(shard_set, range(5), num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert multiprocessing.active_children() == []


def test_resuming_mid_way_gives_the_same_batches(shard_set):
    assert_equal_batches(batches(shard_set, range(6))[4:], batches(shard_set, range(4, 6)))


def test_ranks_share_the_batch_of_one_process(shard_set):
    (whole,) = batches(shard_set, range(2, 3))
    shares = [batches(shard_set, range(2, 3), world=World(rank=rank, size=2))[0] for rank in range(2)]
    for name in ("rows", "pixels", "labels", "augmentation_seeds"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))


def test_no_steps_give_no_batches(shard_set):
    assert batches(shard_set, range(0)) == batches(shard_set, range(0), num_workers=2) == []


def test_seeds_differ_wherever_anything_differs():
    rows = np.array([4, 4, 9])
    seeds = [augmentation_seeds(seed, step, rows).tolist() for seed in (0, 1, 2**40) for step in (0, 1, 10**9)]
    flat = [value for values in seeds for value in values]
    assert len(set(flat)) == len(flat)
    assert min(flat) >= 0


@pytest.fixture
def damaged(shard_set, tmp_path) -> ShardSet:
    """The picture of row 9 is no picture any more."""
    shutil.copytree(shard_set.folder, tmp_path / "damaged")
    overwrite_picture(tmp_path / "damaged", shard_set, row=9)
    with ShardSet.open(tmp_path / "damaged") as opened:
        yield opened


def overwrite_picture(folder: Path, shard_set: ShardSet, *, row: int) -> None:
    sample = shard_set.samples.slice(row, 1).to_pylist()[0]
    with (folder / sample["shard"]).open("rb+") as file:
        file.seek(sample["offset"])
        file.write(bytes(sample["size"]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_picture_ends_training_with_its_key(damaged, num_workers):
    with pytest.raises(DataError, match=rf"sample '{damaged.key(9)}' \(row 9 of .*damaged\) cannot be decoded"):
        batches(damaged, range(10), num_workers=num_workers)
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error(shard_set):
    reading = training_batches(
        shard_set, plan_of(shard_set), TRANSFORM, world=World(), seed=7, steps=range(1000), num_workers=1
    )
    next(reading)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ResourceError, match="a worker process ended"):
        for _ in reading:
            pass


def test_stopping_early_leaves_no_worker(shard_set):
    reading = training_batches(
        shard_set, plan_of(shard_set), TRANSFORM, world=World(), seed=7, steps=range(1000), num_workers=1
    )
    next(reading)
    assert len(multiprocessing.active_children()) == 1
    reading.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_threads", [1, 3])
def test_evaluation_sees_every_sample_once_in_row_order(shard_set, num_threads):
    transform = EvaluationTransform(InputSettings(size=16))
    rows, pixels = [], []
    for name in shard_set.shard_names:
        for batch in evaluation_batches(shard_set, name, transform, batch_size=2, num_threads=num_threads):
            assert len(batch.rows) == len(batch.pixels) <= 2
            assert batch.skipped == ()
            rows += batch.rows.tolist()
            pixels.append(batch.pixels)
    assert rows == list(range(shard_set.num_samples))
    assert torch.cat(pixels).shape == (shard_set.num_samples, 3, 16, 16)


def test_pictures_that_keep_their_shapes_come_grouped_by_them(damaged):
    transform = EvaluationTransform(InputSettings(max_side=36))
    for name in damaged.shard_names:
        expected, seen, skipped = damaged.rows_of_shard(name), [], []
        for batch in evaluation_batches(damaged, name, transform, batch_size=4):
            skipped += batch.skipped
            for row, pixels in zip(batch.rows.tolist(), batch.pixels, strict=True):
                seen.append(row)
                np.testing.assert_array_equal(pixels, transform(decode_image(damaged.read_bytes(row))))
        assert sorted([*seen, *(row for row, _ in skipped)]) == list(expected)
        # Of consecutive samples only, so memory stays bounded.
        assert all(abs(position - (row - expected[0])) < 4 + len(skipped) for position, row in enumerate(seen))


def test_evaluation_names_what_it_skips(damaged):
    transform = EvaluationTransform(InputSettings(size=16))
    name = damaged.samples["shard"][9].as_py()
    seen, skipped = [], []
    for batch in evaluation_batches(damaged, name, transform, batch_size=1):
        seen += batch.rows.tolist()
        skipped += batch.skipped
    assert skipped == [(9, "not_an_image")]
    assert sorted([*seen, 9]) == list(damaged.rows_of_shard(name))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ending", ["exhausted", "closed", "error"])
def test_reading_leaves_nothing_behind(shard_set, damaged, num_workers, ending):
    """No open file, process, thread or shared memory, however reading ends."""
    batches(shard_set, range(1), num_workers=num_workers)  # starts what stays by design: the fork server
    shard_set.close()
    before = left_behind()
    with ShardSet.open(damaged.folder if ending == "error" else shard_set.folder) as opened:
        reading = training_batches(
            opened, plan_of(opened), TRANSFORM, world=World(), seed=7, steps=range(10), num_workers=num_workers
        )
        next(reading)
        if ending == "exhausted":
            assert len(list(reading)) == 9
        elif ending == "closed":
            reading.close()
        else:
            with pytest.raises(DataError):
                list(reading)
    del reading
    assert left_behind() == before


def left_behind() -> tuple[int, list, int, set[str]]:
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":  # of a queue that was closed; it ends by itself
            thread.join(timeout=10)
    files = len(list(Path("/proc/self/fd").iterdir()))
    shared = {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(f"torch_{os.getpid()}_")}
    return files, multiprocessing.active_children(), threading.active_count(), shared


INTERRUPTED = """
import os, sys
from pathlib import Path
from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.loader import training_batches
from data_pipelines.settings import AugmentationSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import TrainingTransform
from lookalike.world import World

if __name__ == "__main__":
    with ShardSet.open(Path(sys.argv[1])) as shard_set:
        rows = shard_set.rows("train")
        plan = ClassBalancedBatches(shard_set.labels, rows, classes_per_batch=2, images_per_class=4, seed=5)
        transform = TrainingTransform(AugmentationSettings(), 24)
        reading = training_batches(
            shard_set, plan, transform, world=World(), seed=7, steps=range(10**9), num_workers=int(sys.argv[2])
        )
        for batch in reading:
            if batch.step == 2:
                print("reading", flush=True)
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_ends_at_once_and_everything(shard_set, tmp_path, num_workers):
    script = tmp_path / "reading.py"
    script.write_text(INTERRUPTED)
    reading = subprocess.Popen(
        [sys.executable, str(script), str(shard_set.folder), str(num_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        process_group=0,
    )
    assert reading.stdout.readline() == "reading\n"
    os.killpg(reading.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    # Returns once nobody holds its end of the pipes: the workers are gone, too.
    _, errors = reading.communicate(timeout=20)
    assert reading.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, errors


LASTING = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from data_pipelines.class_balanced_batches import ClassBalancedBatches
from data_pipelines.loader import training_batches
from data_pipelines.shard_set import ShardSet
from lookalike.world import World
import numpy as np

class SlowTransform:
    def __call__(self, picture, *, seed):
        time.sleep(0.05)
        return np.zeros((3, 8, 8), np.uint8)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: print("asked", flush=True))
    with ShardSet.open(Path(sys.argv[1])) as shard_set:
        rows = shard_set.rows("train")
        plan = ClassBalancedBatches(shard_set.labels, rows, classes_per_batch=2, images_per_class=4, seed=5)
        reading = training_batches(
            shard_set, plan, SlowTransform(), world=World(), seed=7, steps=range(10**9), num_workers=2
        )
        next(reading)
        workers = multiprocessing.active_children()
        print("reading", flush=True)
        steps = [next(reading).step for _ in range(8)]  # more than were under way
        assert multiprocessing.active_children() == workers and all(worker.is_alive() for worker in workers)
        print(steps[-1], flush=True)
        ending = sys.argv[2]
        if ending == "terminated":
            for worker in workers:
                worker.terminate()
                worker.join(10)
                assert worker.exitcode == 143, worker.exitcode
        elif ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            reading.close()
            assert not any(worker.is_alive() for worker in workers)
        os._exit(0)
"""


@pytest.mark.parametrize("ending", ["closed", "terminated", "killed"])
def test_workers_outlive_a_sigterm_to_the_process_group_and_not_their_parent(shard_set, tmp_path, ending):
    script = tmp_path / "reading.py"
    script.write_text(LASTING)
    reading = subprocess.Popen(
        [sys.executable, str(script), str(shard_set.folder), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        process_group=0,
    )
    assert reading.stdout.readline() == "reading\n"
    os.killpg(reading.pid, signal.SIGTERM)  # as a scheduler does
    # Returns once nobody holds its end of the pipes: the workers are gone, too.
    output, errors = reading.communicate(timeout=60)
    assert output == "asked\n8\n", errors
    assert reading.returncode == (-signal.SIGKILL if ending == "killed" else 0), errors
