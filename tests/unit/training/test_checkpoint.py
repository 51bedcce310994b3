import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.loader import Batch, training_batches
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import TrainingTransform
from lookalike.encoder import Encoder, create_encoder, load_encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.errors import ArtifactError
from lookalike.settings import validate_settings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training import checkpoint as checkpoint_module
from training.checkpoint import (
    CheckpointWriter,
    best_checkpoint,
    load_newest_checkpoint,
    on_host,
    save_checkpoint,
)
from training.loop import train
from training.run_length import plan_batches
from training.settings import TrainSettings
from training.stop_request import StopRequest


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return create_encoder(EncoderSettings(backbone="test_resnet", projection_dim=4))


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_last_ones_stay_and_the_best_beyond_them(encoder: Encoder, tmp_path: Path) -> None:
    values = {10: 0.2, 20: 0.7, 30: None, 40: 0.7, 50: 0.6}
    for step, value in values.items():
        save_checkpoint(tmp_path, encoder, {}, step=step, identity="x", num_kept=2, validation=value)
        assert value is None or (tmp_path / "checkpoints" / "best.json").exists()
    assert steps_of(tmp_path) == [20, 40, 50], "of two equal values the earlier is the best"
    named = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert named == {"step": 20, "value": 0.7, "checkpoint": "step_000020"}
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert (best.step, best.value) == (20, 0.7)
    assert best.load_encoder().fingerprint == encoder.fingerprint
    save_checkpoint(tmp_path, encoder, {}, step=60, identity="x", num_kept=2, validation=0.9)
    assert steps_of(tmp_path) == [50, 60], "a former best goes like any other"


def test_without_validation_there_is_no_best(encoder: Encoder, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, encoder, {}, step=1, identity="x", num_kept=1)
    assert best_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoints" / "best.json").exists()
    assert best_checkpoint(tmp_path / "nowhere") is None


def test_a_damaged_best_is_no_best_and_best_json_follows(encoder: Encoder, tmp_path: Path) -> None:
    for step, value in ((1, 0.9), (2, 0.5)):
        save_checkpoint(tmp_path, encoder, {}, step=step, identity="x", num_kept=3, validation=value)
    (tmp_path / "checkpoints" / "step_000001" / "manifest.json").write_text("{")
    save_checkpoint(tmp_path, encoder, {}, step=3, identity="x", num_kept=3)
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 2


def test_background_and_foreground_write_the_same_bytes(encoder: Encoder, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    optimizer = torch.optim.AdamW([{"params": [parameter], "betas": (0.8, 0.9)}, {"params": []}])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shared = torch.arange(100)
    state = {"optimizer": optimizer.state_dict(), "loss": torch.nn.Linear(2, 2).state_dict(), "views": shared[:3]}
    for name, in_background in (("front", False), ("back", True)):
        with CheckpointWriter(tmp_path / name, identity="x", num_kept=1, in_background=in_background) as writer:
            writer.save(encoder, state, step=7, validation=0.5)
    front, back = bytes_below(tmp_path / "front"), bytes_below(tmp_path / "back")
    assert front.keys() == back.keys()
    assert all(front[name] == back[name] for name in front)
    loaded = load_newest_checkpoint(tmp_path / "back", identity="x")
    assert loaded is not None
    assert loaded.state["views"].tolist() == [0, 1, 2]
    optimizer.load_state_dict(loaded.state["optimizer"])
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 1 - 0.8))


def test_what_training_changes_after_save_is_not_in_the_checkpoint(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write = torch.save
    monkeypatch.setattr(checkpoint_module.torch, "save", lambda *args: (may_write.wait(30), write(*args)))
    moving = create_encoder(encoder.settings)
    before = {name: value.clone() for name, value in moving.state_dict().items()}
    random_state = torch.get_rng_state()
    counts = torch.zeros(3)
    with CheckpointWriter(tmp_path, identity="x", num_kept=1, in_background=True) as writer:
        writer.save(moving, {"counts": counts}, step=1)
        assert load_newest_checkpoint(tmp_path, identity="x") is None, "save must not wait for the write"
        counts += 1
        with torch.no_grad():
            for parameter in moving.parameters():
                parameter += 1
        writer.raise_failure()
        may_write.set()
    assert torch.equal(torch.get_rng_state(), random_state)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert checkpoint.state["counts"].tolist() == [0, 0, 0]
    assert all(torch.equal(checkpoint.weights[name], value) for name, value in before.items())


def test_at_most_one_checkpoint_is_in_flight(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_writing, most = 0, 0
    write = torch.save

    def slow_save(*arguments: object) -> None:
        nonlocal num_writing, most
        num_writing += 1
        most = max(most, num_writing)
        write(*arguments)  # type: ignore[arg-type]
        num_writing -= 1

    monkeypatch.setattr(checkpoint_module.torch, "save", slow_save)
    with CheckpointWriter(tmp_path, identity="x", num_kept=9, in_background=True) as writer:
        for step in (1, 2, 3):
            writer.save(encoder, {}, step=step)
            assert steps_of(tmp_path)[: step - 1] == list(range(1, step)), "the one before must be published"
    assert most == 1
    assert steps_of(tmp_path) == [1, 2, 3], "the last one is waited for"


def test_an_error_of_the_writer_stops_the_run_with_its_own_message(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "training_state.pt")

    def save_and(goes_on: Callable[[CheckpointWriter], None]) -> None:
        with CheckpointWriter(tmp_path, identity="x", num_kept=1, in_background=True) as writer:
            writer.save(encoder, {}, step=1)
            goes_on(writer)

    def train_on(writer: CheckpointWriter) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            writer.raise_failure()
        pytest.fail("training would have gone on")

    def fail_otherwise(writer: CheckpointWriter) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    for goes_on in (train_on, lambda writer: None):
        with pytest.raises(OSError, match="No space left on device"):
            save_and(goes_on)
    with pytest.raises(ZeroDivisionError):
        save_and(fail_otherwise)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_state_that_could_not_be_read_again_is_refused_before_anything_is_written(
    encoder: Encoder, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="found ndarray"):
        save_checkpoint(tmp_path, encoder, {"memory": [np.zeros(3)]}, step=1, identity="x", num_kept=1)
    assert not tmp_path.joinpath("checkpoints").exists()
    assert on_host({"a": (1, None, [True, "text", 0.5])}) == {"a": (1, None, [True, "text", 0.5])}


def save_for_ever(run: Path, name: str) -> None:
    """Publishes step 1, then hangs in the middle of step 2."""
    encoder = create_encoder(EncoderSettings(backbone="test_resnet", projection_dim=4))
    writer = CheckpointWriter(run, identity="x", num_kept=1, in_background=True)
    writer.save(encoder, {"step": torch.tensor(1)}, step=1)
    writer.wait()
    write = torch.save

    def write_half(state: object, path: Path) -> None:
        write(state, path)
        path.write_bytes(path.read_bytes()[:-100])
        (run / name).touch()
        time.sleep(600)

    torch.save = write_half
    writer.save(encoder, {"step": torch.tensor(2)}, step=2)
    writer.wait()


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(encoder: Encoder, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=save_for_ever, args=(tmp_path, "is_writing"), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "is_writing").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert checkpoint.step == int(checkpoint.state["step"]) == 1
    save_checkpoint(tmp_path, encoder, {}, step=2, identity="x", num_kept=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"], "nothing is left behind"


def train_settings(shards: Path, run: Path) -> TrainSettings:
    tree: dict[str, object] = {
        "shards": str(shards),
        "run": run,
        "num_steps": 2,
        "batch": {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 4},
        "encoder": {"backbone": "test_resnet", "projection_dim": 4, "input": {"size": 32}},
        "optimizer": {"lr": 1e-3},
        "average_decay": 0.5,
        "num_workers": 0,
    }
    return validate_settings(TrainSettings, tree, where="test")


def train_on_rank(world: World, shards: Path, run: Path) -> None:
    train(train_settings(shards, run), world=world)


def outline(state: object) -> object:
    """Names, types and shapes of a state."""
    if isinstance(state, dict):
        return {key: outline(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [outline(value) for value in state]
    return (state.dtype, tuple(state.shape)) if isinstance(state, torch.Tensor) else type(state)


def test_nothing_in_a_checkpoint_depends_on_the_world(shards_folder: Path, tmp_path: Path) -> None:
    train_on_rank(World(), shards_folder, tmp_path / "one")
    run_on_ranks(train_on_rank, 2, shards_folder, tmp_path / "two")
    states = []
    for name in ("one", "two"):
        manifest = json.loads((tmp_path / name / "checkpoints" / "step_000002" / "manifest.json").read_text())
        checkpoint = load_newest_checkpoint(tmp_path / name, identity=manifest["details"]["identity"])
        assert checkpoint is not None
        states.append((manifest["details"]["identity"], outline(checkpoint.weights), outline(checkpoint.state)))
    assert states[0] == states[1]


def test_a_run_resumed_at_another_world_size_sees_the_same_pictures_in_the_same_order(shards_folder: Path) -> None:
    settings = train_settings(shards_folder, Path("unused"))

    def batches_of(world: World) -> list[Batch]:
        with ShardSet.open(shards_folder) as shard_set:
            plan, transform = plan_batches(settings, shard_set, world), TrainingTransform(settings.augmentation, 32)
            return list(
                training_batches(shard_set, plan, transform, world=world, seed=0, steps=range(2, 5), num_workers=0)
            )

    for whole, *parts in zip(batches_of(World()), batches_of(World(0, 2)), batches_of(World(1, 2)), strict=True):
        assert whole.rows.tolist() == [row for part in parts for row in part.rows.tolist()]
        assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))


def test_sigterm_is_remembered_and_one_that_is_no_echo_does_what_it_did_before() -> None:
    received: list[int] = []
    now = 100.0
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with StopRequest(clock=lambda: now) as stop:
            assert not stop.agreed(World(), device=torch.device("cpu"))
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed(World(), device=torch.device("cpu"))
            now = 104.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [], "a launcher passes on what this process was sent, too"
            now = 106.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
            with pytest.raises(SystemExit) as exit_:
                stop.leave()
            assert exit_.value.code == 143
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2, "the handler of before is back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_there_is_no_request() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen: list[bool] = []

    def listen() -> None:
        with StopRequest() as stop:
            seen.append(stop.is_made)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is handler


def ask_second_rank(world: World) -> bool:
    stop = StopRequest()
    stop.is_made = world.rank == 1
    return stop.agreed(world, device=torch.device("cpu"))


def test_all_ranks_stop_when_one_is_asked() -> None:
    assert run_on_ranks(ask_second_rank, 2) == [True, True]


def test_a_damaged_checkpoint_is_passed_over_and_old_ones_are_removed(tmp_path: Path) -> None:
    encoder = create_encoder(EncoderSettings(backbone="resnet10t"))
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, encoder, {"some": step}, step=step, identity="x", num_kept=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000002", "step_000003"]
    file = tmp_path / "checkpoints" / "step_000003" / "training_state.pt"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (2, {"some": 2})
    # A checkpoint's encoder is one to embed with.
    assert load_encoder(tmp_path / "checkpoints" / "step_000002" / "encoder").fingerprint == encoder.fingerprint
    assert load_newest_checkpoint(tmp_path / "empty", identity="x") is None


def test_after_damage_the_run_goes_on_from_before_it_and_keeps_what_it_writes(tmp_path: Path) -> None:
    encoder = create_encoder(EncoderSettings(backbone="resnet10t"))
    for step in (100, 200):
        save_checkpoint(tmp_path, encoder, {}, step=step, identity="x", num_kept=2)
    (tmp_path / "checkpoints" / "step_000200" / "training_state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, encoder, {}, step=110, identity="x", num_kept=1)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert checkpoint.step == 110
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, encoder, {}, step=step, identity="x", num_kept=1)
    checkpoint = load_newest_checkpoint(tmp_path, identity="x")
    assert checkpoint is not None
    assert checkpoint.step == 1_000_000


def test_a_checkpoint_of_a_newer_program_is_not_taken_for_damage(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path, create_encoder(EncoderSettings(backbone="resnet10t")), {}, step=1, identity="x", num_kept=1
    )
    manifest = tmp_path / "checkpoints" / "step_000001" / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "format_version": 99, "a_new_field": 1}))
    with pytest.raises(ArtifactError, match="Upgrade lookalike"):
        load_newest_checkpoint(tmp_path, identity="x")
