"""The batch plan under random class sizes, seeds and worlds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.class_balanced_batches import ClassBalancedBatches, rank_share
from data_pipelines.loader import augmentation_seeds
from lookalike.errors import DataError, SettingsError
from lookalike.world import World


@st.composite
def plan_arguments(draw) -> dict:
    """Classes of 2 to 9 pictures whose rows are scattered."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=12))
    scatter = np.random.default_rng(draw(st.integers(0, 1000)))
    return {
        "labels": scatter.permutation(np.repeat(np.arange(len(sizes)) * 3, sizes)).astype(np.int64),
        "classes_per_batch": draw(st.integers(1, len(sizes))),
        "images_per_class": draw(st.integers(1, 6)),
        "seed": draw(st.integers(0, 2**40)),
    }


def plan_of(arguments: dict) -> tuple[ClassBalancedBatches, np.ndarray]:
    """A plan over all samples, and their labels."""
    labels = arguments["labels"]
    return ClassBalancedBatches(**arguments, rows=np.arange(len(labels))), labels


def rows_of_steps(plan: ClassBalancedBatches, steps: range) -> np.ndarray:
    return np.concatenate([plan.rows_of_step(step) for step in steps])


@given(plan_arguments())
def test_a_batch_holds_k_images_of_each_of_p_classes(arguments):
    plan, labels = plan_of(arguments)
    for step in range(2 * plan.num_steps_per_epoch):
        rows = plan.rows_of_step(step)
        grouped = labels[rows].reshape(plan.classes_per_batch, plan.images_per_class)
        assert (grouped == grouped[:, :1]).all()
        assert len(set(grouped[:, 0])) == plan.classes_per_batch
        for label, count in Counter(labels[rows].tolist()).items():
            uses = Counter(rows[labels[rows] == label].tolist())
            # As evenly as the class allows: no repeats where it has enough images.
            assert max(uses.values()) <= -(-count // (labels == label).sum())


@given(plan_arguments())
@settings(max_examples=50)
def test_an_epoch_takes_no_class_twice(arguments):
    plan, labels = plan_of(arguments)
    for epoch in range(3):
        steps = range(epoch * plan.num_steps_per_epoch, (epoch + 1) * plan.num_steps_per_epoch)
        counts = Counter(labels[rows_of_steps(plan, steps)].tolist())
        assert set(counts.values()) == {plan.images_per_class}
        assert len(counts) == plan.num_steps_per_epoch * plan.classes_per_batch


@given(plan_arguments(), st.integers(1, 30))
@settings(max_examples=50)
def test_no_class_starves_and_no_image_is_used_twice_more_than_another_of_its_class(arguments, num_epochs):
    plan, labels = plan_of(arguments)
    uses = np.bincount(rows_of_steps(plan, range(num_epochs * plan.num_steps_per_epoch)), minlength=len(labels))
    uses_of_class = []
    for label in np.unique(labels):
        of_class = uses[labels == label]
        assert of_class.max() - of_class.min() <= 1
        uses_of_class.append(of_class.sum() // plan.images_per_class)
    # Classes sit out in turn, so after any number of epochs they differ by one turn at most.
    assert max(uses_of_class) - min(uses_of_class) <= 1


@given(plan_arguments())
@settings(max_examples=25)
def test_after_as_many_epochs_as_classes_all_have_been_used_equally(arguments):
    plan, labels = plan_of(arguments)
    rows = rows_of_steps(plan, range(plan.num_classes * plan.num_steps_per_epoch))
    counts = Counter(labels[rows].tolist())
    assert len(counts) == plan.num_classes
    assert len(set(counts.values())) == 1


@given(plan_arguments(), st.integers(0, 10**6))
def test_a_step_depends_on_no_other_step(arguments, step):
    plan, _ = plan_of(arguments)
    fresh, _ = plan_of(arguments)
    plan.rows_of_step(step + 7 * plan.num_steps_per_epoch)
    np.testing.assert_array_equal(plan.rows_of_step(step), fresh.rows_of_step(step))


@given(plan_arguments(), st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 6]))
def test_the_global_batch_is_the_same_at_every_world_size(arguments, step, world_size):
    plan, _ = plan_of(arguments)
    batch = plan.rows_of_step(step)
    worlds = [World(rank=rank, size=world_size) for rank in range(world_size)]
    if len(batch) % world_size:
        with pytest.raises(SettingsError, match="cannot be divided equally"):
            rank_share(batch, worlds[0])
    else:
        shares = [rank_share(batch, world) for world in worlds]
        assert len({len(share) for share in shares}) == 1
        np.testing.assert_array_equal(np.concatenate(shares), batch)


def test_epochs_and_seeds_differ():
    labels = np.repeat(np.arange(20), 10)
    plan, other = (
        ClassBalancedBatches(labels, np.arange(200), classes_per_batch=5, images_per_class=4, seed=seed)
        for seed in (0, 1)
    )
    assert plan.rows_of_step(0).tolist() != plan.rows_of_step(plan.num_steps_per_epoch).tolist()
    assert plan.rows_of_step(0).tolist() != other.rows_of_step(0).tolist()


def test_only_the_given_rows_are_used():
    labels = np.array([0, 0, 0, 1, 1, 1, -1])
    plan = ClassBalancedBatches(labels, np.array([0, 2, 4, 5]), classes_per_batch=2, images_per_class=2, seed=0)
    assert sorted(plan.rows_of_step(3).tolist()) == [0, 2, 4, 5]


def test_single_image_classes_take_part_by_choice_only():
    labels = np.array([0, 0, 1])
    arguments = {"classes_per_batch": 2, "images_per_class": 2, "seed": 0}
    with pytest.raises(DataError, match="2 classes per batch asked for, but there are 1 classes with two or more"):
        ClassBalancedBatches(labels, np.arange(3), **arguments)
    plan = ClassBalancedBatches(labels, np.arange(3), **arguments, keeps_single_image_classes=True)
    assert sorted(plan.rows_of_step(0).tolist()) == [0, 1, 2, 2]


def test_samples_without_a_class_are_refused():
    with pytest.raises(DataError, match="1 of 3 samples have no class"):
        ClassBalancedBatches(np.array([0, 0, -1]), np.arange(3), classes_per_batch=1, images_per_class=2, seed=0)


def test_batches_stay_what_they_are() -> None:
    """A run that is resumed by a newer version must see the batches it would have seen.

    Renew the values only together with a note in the changelog that runs begun before cannot be resumed.
    """
    labels = np.repeat(np.arange(5), [2, 3, 4, 5, 6])
    plan = ClassBalancedBatches(labels, np.arange(20), classes_per_batch=2, images_per_class=3, seed=7)
    assert [plan.rows_of_step(step).tolist() for step in (0, 1, 2, 1000)] == [
        [11, 13, 9, 1, 0, 1],
        [4, 3, 2, 18, 19, 17],
        [16, 14, 15, 2, 3, 4],
        [19, 15, 14, 3, 2, 4],
    ]
    seeds = augmentation_seeds(7, 1000, np.array([3, 3, 19]))
    assert seeds.tolist() == [6267007301231848918, 4404560740165778886, 8466174645668590637]
