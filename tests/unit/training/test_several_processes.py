"""Several processes train the encoder of one."""

import importlib.util
import json
from pathlib import Path

import pytest

from data_pipelines.shard_set import ShardSet
from lookalike.encoder import load_encoder
from lookalike.errors import SettingsError
from lookalike.events import read_events
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from tests.unit.training.small_runs import VALIDATION, interrupt, settings_for, stop_at
from training import loop
from training.loop import train
from training.run_folder import run_identity


def train_on_rank(world: World, shards: Path, run: Path, backend: dict[str, object]) -> None:
    """Interrupted after step 1, and gone on with."""
    settings = settings_for(
        shards, run, backend=backend, optimizer={"lr": 1e-4, "max_gradient_norm": 0.1}, steps_per_checkpoint=1
    )
    original = loop.take_step
    loop.take_step = stop_at(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings, world=world)
    loop.take_step = original
    train(settings, world=world)


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_two_processes_of_every_back_end_train_the_encoder_of_one(
    shards_folder: Path, tmp_path: Path, name: str
) -> None:
    """Another back end may also go on with the run: it is the same one."""
    train_on_rank(World(), shards_folder, tmp_path / "one", {"name": "single"})
    run_on_ranks(train_on_rank, 2, shards_folder, tmp_path / "two", {"name": name})
    one = load_encoder(tmp_path / "one" / "encoder").state_dict()
    two = load_encoder(tmp_path / "two" / "encoder").state_dict()
    for key, value in one.items():
        # Three steps of 1e-4; Adam turns rounding of vanishing gradients into a step for a few weights.
        assert float((two[key].double() - value.double()).abs().mean()) < 1e-6, key
    with ShardSet.open(shards_folder) as shard_set:
        identities = {
            run_identity(settings_for(shards_folder, tmp_path, backend={"name": backend}), shard_set)
            for backend in ("single", name)
        }
    assert len(identities) == 1


def validate_on_rank(world: World, shards: Path, run: Path, backend: dict[str, object]) -> None:
    settings = settings_for(shards, run, backend=backend, optimizer={"lr": 1e-4}, validation=VALIDATION, num_steps=2)
    train(settings, world=world)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param({"name": "fsdp2", "smallest_unit": 500}, id="fsdp2"),
        pytest.param(
            {"name": "deepspeed", "zero_stage": 3, "largest_whole_parameter": 0},
            id="zero3",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no extra [deepspeed]"),
            ],
        ),
    ],
)
def test_spread_weights_are_validated_as_whole_ones(
    shards_folder: Path, tmp_path: Path, backend: dict[str, object]
) -> None:
    validate_on_rank(World(), shards_folder, tmp_path / "one", {"name": "single"})
    run_on_ranks(validate_on_rank, 2, shards_folder, tmp_path / "two", backend)
    one = read_events(tmp_path / "one" / "events-rank0.jsonl", "validation")
    for rank in (0, 1):
        found = read_events(tmp_path / "two" / f"events-rank{rank}.jsonl", "validation")
        assert [event["value"] for event in found] == pytest.approx([event["value"] for event in one], abs=1e-3)
        assert [event["step"] for event in found] == [1, 2]
    # Validated as it will be found: the encoder of the best checkpoint has the value that chose it.
    best = json.loads((tmp_path / "two" / "checkpoints" / "best.json").read_text())
    encoder = load_encoder(tmp_path / "two" / "encoder")
    with ShardSet.open(shards_folder) as shard_set:
        settings = settings_for(shards_folder, tmp_path, validation=VALIDATION)
        validator = loop.create_validator(settings, shard_set, World())
        assert validator is not None
        assert validator.validate(encoder)["value"] == pytest.approx(best["value"], abs=1e-6)


def test_a_back_end_that_cannot_do_what_is_asked_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    settings = settings_for("nowhere", tmp_path, backend={"name": "fsdp2"}, loss={"name": "proxy_nca"})
    with pytest.raises(SettingsError, match="parameters of its own"):
        train(settings, world=World(0, 2))
    with pytest.raises(SettingsError, match="found 1"):
        train(settings)
