from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray

from data_pipelines.hard_class_batches import HardClassBatches
from data_pipelines.shard_set import ShardSet
from lookalike.errors import SettingsError
from lookalike.events import read_events
from lookalike.settings import validate_settings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training import loop
from training.hard_classes import HardClasses
from training.loop import take_step, train
from training.run_length import plan_batches
from training.settings import HardClassSettings, TrainSettings

CPU = torch.device("cpu")


def settings_for(shards: Path, run: Path, **changes: object) -> TrainSettings:
    """Three steps are an epoch of six classes; the near ones are looked for before steps 3 and 6."""
    tree: dict[str, object] = {
        "shards": str(shards),
        "run": run,
        "num_steps": 9,
        "batch": {
            "classes_per_batch": 2,
            "images_per_class": 4,
            "chunk_size": 4,
            "hard_classes": {"classes_per_group": 2},
        },
        "encoder": {"backbone": "resnet10t", "projection_dim": 8, "input": {"size": 32}},
        "optimizer": {"lr": 1e-2},
        "steps_per_checkpoint": 1,
        "num_workers": 0,
    }
    return validate_settings(TrainSettings, {**tree, **changes}, where="test")


def test_a_class_is_where_its_pictures_were_last_and_its_neighbours_are_near() -> None:
    """Classes 2, 5 and 9 lie on a circle; 7 was never seen."""
    classes = HardClasses(torch.tensor([2, 5, 7, 9]), dim=2, settings=HardClassSettings(num_near=3))
    classes.observe(torch.tensor([[0.0, 1], [0, 1], [1, 0], [1, 0]]), torch.tensor([9, 9, 2, 2]))
    # Class 2 moves next to 9; that of class 5 is a mean.
    classes.observe(torch.tensor([[1.0, 0], [0, -1], [0.2, 1], [0, 1]]), torch.tensor([5, 5, 2, 2]))
    assert classes.near_classes is None
    classes.refresh(device=CPU, world=World())
    near = classes.near_classes
    assert near is not None
    assert near.shape == (10, 2), "of three seen classes each has two others"
    assert near[2].tolist() == [9, 5]
    assert near[9].tolist() == [2, 5]
    assert near[5].tolist() == [2, 9]
    assert (near[7] == 7).all()
    assert (near[3] == 3).all()


def test_before_any_batch_no_class_is_near() -> None:
    classes = HardClasses(torch.arange(4), dim=2, settings=HardClassSettings())
    classes.refresh(device=CPU, world=World())
    assert classes.near_classes is not None
    assert classes.near_classes.tolist() == [[0], [1], [2], [3]]


def test_refreshes_come_when_the_settings_say() -> None:
    classes = HardClasses(torch.arange(4), dim=2, settings=HardClassSettings(first_epoch=2, epochs_between=3))
    assert list(classes.refresh_steps(num_steps=60, num_steps_per_epoch=5)) == [10, 25, 40, 55]


def test_groups_that_do_not_fill_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"classes_per_group \(4\) must divide classes_per_batch \(6\)"):
        settings_for(tmp_path, tmp_path, batch={"classes_per_batch": 6, "hard_classes": {}})


def record_labels(into: list[list[int]], *, stop_after: int | None = None):  # type: ignore[no-untyped-def]
    """`take_step` that notes a step's labels, and is interrupted after a step."""

    def noted(state: Any, pixels: Any, labels: torch.Tensor, *arguments: Any, step: int, **options: Any) -> Any:
        into.append(labels.tolist())
        measured = take_step(state, pixels, labels, *arguments, step=step, **options)
        if step == stop_after:
            raise KeyboardInterrupt
        return measured

    return noted


@pytest.mark.parametrize(("stop_after", "num_workers"), [(5, 0), (7, 1)])
def test_a_run_interrupted_at_or_within_an_epoch_goes_on_to_the_same_bits(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, num_workers: int
) -> None:
    undisturbed_labels: list[list[int]] = []
    monkeypatch.setattr(loop, "take_step", record_labels(undisturbed_labels))
    undisturbed = train(settings_for(shards_folder, tmp_path / "undisturbed"))

    labels: list[list[int]] = []
    interrupted = settings_for(shards_folder, tmp_path / "interrupted", num_workers=num_workers)
    monkeypatch.setattr(loop, "take_step", record_labels(labels, stop_after=stop_after))
    with pytest.raises(KeyboardInterrupt):
        train(interrupted)
    monkeypatch.setattr(loop, "take_step", record_labels(labels))
    folder = train(interrupted)
    # The checkpoint of the step that was interrupted is not written: that step is done twice.
    assert labels == undisturbed_labels[: stop_after + 1] + undisturbed_labels[stop_after:]
    assert (folder / "encoder.safetensors").read_bytes() == (undisturbed / "encoder.safetensors").read_bytes()


def test_batches_follow_the_embeddings_of_the_epoch_before(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow twin makes each epoch's plan from the means of the last embeddings of each class."""
    settings = settings_for(shards_folder, tmp_path / "run")
    seen: dict[int, ndarray] = {}
    labels: list[list[int]] = []
    expected: list[list[int]] = []
    shard_set = ShardSet.open(shards_folder)
    rows = shard_set.rows("train")
    plan: Any = plan_batches(settings, shard_set, World())
    original = HardClasses.observe

    def observe(self: HardClasses, embeddings: torch.Tensor, batch_labels: torch.Tensor) -> None:
        for label in set(batch_labels.tolist()):
            seen[label] = embeddings[batch_labels == label].mean(dim=0).numpy()
        original(self, embeddings, batch_labels)

    def step_with_twin(*step_arguments: Any, step: int, **options: Any) -> Any:
        nonlocal plan
        if step and step % 3 == 0:
            near = np.tile(np.arange(12)[:, None], (1, 5))
            for label, own in seen.items():
                others = [other for other in seen if other != label]
                near[label] = sorted(
                    others, key=lambda o: -float(seen[o] @ own / np.linalg.norm(seen[o]) / np.linalg.norm(own))
                )
            plan = HardClassBatches(
                shard_set.labels, rows, near, classes_per_group=2, classes_per_batch=2, images_per_class=4, seed=0
            )
        expected.append(shard_set.labels[plan.rows_of_step(step)].tolist())
        return record_labels(labels)(*step_arguments, step=step, **options)

    monkeypatch.setattr(HardClasses, "observe", observe)
    monkeypatch.setattr(loop, "take_step", step_with_twin)
    train(settings)
    assert labels == expected
    plain = plan_batches(settings, shard_set, World())
    plain_labels = [shard_set.labels[plain.rows_of_step(step)].tolist() for step in range(9)]
    assert labels[:3] == plain_labels[:3]
    assert labels[3:] != plain_labels[3:]


def train_and_tell(world: World, shards: Path, run: Path) -> tuple[list[list[int]], list[list[int]]]:
    """This rank's labels of every step, and the near classes at the end."""
    near: list[list[int]] = []
    labels: list[list[int]] = []
    original = HardClasses.refresh

    def refresh(self: HardClasses, **options: Any) -> None:
        original(self, **options)
        assert self.near_classes is not None
        near.append(self.near_classes.tolist())

    HardClasses.refresh = refresh  # type: ignore[method-assign]
    loop.take_step = record_labels(labels)
    train(settings_for(shards, run, optimizer={"lr": 1e-4}), world=world)
    return labels, near


def test_ranks_agree_and_see_the_batches_of_one_process(shards_folder: Path, tmp_path: Path) -> None:
    (first, first_near), (second, second_near) = run_on_ranks(train_and_tell, 2, shards_folder, tmp_path / "two")
    [(alone, near)] = run_on_ranks(train_and_tell, 1, shards_folder, tmp_path / "one")
    assert first_near == second_near == near
    assert len(near) == 2
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    assert len(read_events(tmp_path / "two" / "events-rank1.jsonl", "step")) == 9


def test_hard_classes_that_would_never_meet_are_refused(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run", num_steps=3)
    with pytest.raises(SettingsError, match="no effect: the run ends after 3 steps, epoch 1 begins after 3"):
        train(settings)
