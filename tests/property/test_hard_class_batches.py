"""Near classes meet, and all that class-balanced batches promise still holds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.class_balanced_batches import ClassBalancedBatches, rank_share
from data_pipelines.hard_class_batches import HardClassBatches, nearest_classes
from lookalike.world import World


@st.composite
def plan_arguments(draw) -> dict:
    """Classes of 1 to 9 pictures whose rows are scattered; any may be near any."""
    sizes = [*draw(st.lists(st.integers(1, 9), min_size=0, max_size=10)), 2, 3]
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    num_usable = sum(size > 1 for size in sizes)
    classes_per_group = draw(st.integers(1, num_usable))
    num_groups = draw(st.integers(1, num_usable // classes_per_group))
    return {
        "labels": random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64),
        "near_classes": nearest_classes(random.normal(size=(len(sizes), 3)), draw(st.integers(1, 12))),
        "classes_per_group": classes_per_group,
        "classes_per_batch": classes_per_group * num_groups,
        "images_per_class": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**40)),
    }


def plan_of(arguments: dict) -> HardClassBatches:
    return HardClassBatches(**arguments, rows=np.arange(len(arguments["labels"])))


@given(plan_arguments(), st.integers(1, 12))
@settings(max_examples=60)
def test_every_epoch_takes_what_the_plain_plan_takes(arguments, num_epochs):
    plan = plan_of(arguments)
    plain = {name: value for name, value in arguments.items() if name not in ("near_classes", "classes_per_group")}
    other = ClassBalancedBatches(**plain, rows=np.arange(len(arguments["labels"])))
    for epoch in range(num_epochs):
        steps = range(epoch * plan.num_steps_per_epoch, (epoch + 1) * plan.num_steps_per_epoch)
        taken, expected = (Counter(np.concatenate([p.rows_of_step(s) for s in steps]).tolist()) for p in (plan, other))
        assert taken == expected


@given(plan_arguments(), st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=60)
def test_a_step_is_the_same_wherever_one_starts_and_at_every_world_size(arguments, step, world_size):
    plan = plan_of(arguments)
    plan.rows_of_step(step + 3 * plan.num_steps_per_epoch)
    batch = plan.rows_of_step(step)
    np.testing.assert_array_equal(batch, plan_of(arguments).rows_of_step(step))
    if len(batch) % world_size == 0:
        shares = [rank_share(batch, World(rank=rank, size=world_size)) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(shares), batch)


def test_near_classes_meet():
    """40 clusters of 4 classes: while there is a choice, a group is a cluster."""
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 4)
    centroids = random.normal(size=(40, 16))[clusters] + 0.1 * random.normal(size=(160, 16))
    labels = np.repeat(np.arange(160), 3)
    plan = HardClassBatches(
        labels,
        np.arange(480),
        nearest_classes(centroids, 3),
        classes_per_group=4,
        classes_per_batch=8,
        images_per_class=2,
        seed=0,
    )
    batches = [plan.rows_of_step(step) for step in range(plan.num_steps_per_epoch)]
    for batch in batches:
        groups = clusters[labels[batch]].reshape(2, 8)
        assert (groups == groups[:, :1]).all()
    # Which clusters meet changes from epoch to epoch.
    met = {frozenset(clusters[labels[plan.rows_of_step(step)]].tolist()) for step in range(5 * len(batches))}
    assert len(met) > len(batches)


def test_nearest_classes_are_those_of_a_plain_search(monkeypatch):
    monkeypatch.setattr("data_pipelines.hard_class_batches._CHUNK", 7)
    centroids = np.random.default_rng(0).normal(size=(30, 4))
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    for label, found in enumerate(nearest_classes(centroids, 5)):
        similarities = unit @ unit[label]
        others = sorted((other for other in range(30) if other != label), key=lambda other: -similarities[other])
        assert found.tolist() == others[:5]
    assert nearest_classes(centroids[:3], 5).shape == (3, 2)


@given(st.integers(2, 40), st.integers(1, 45), st.integers(0, 1000))
@settings(max_examples=60)
def test_nearest_classes_are_those_of_a_stable_sort_where_many_are_equally_near(num_classes, k, seed):
    """Axes of two dimensions: similarities of -1, 0 and 1 alone, and a few classes without a direction."""
    axes = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]], dtype=np.float64)
    centroids = axes[np.random.default_rng(seed).integers(0, len(axes), num_classes)]
    similarities = centroids @ centroids.T
    np.fill_diagonal(similarities, -np.inf)
    expected = np.argsort(-similarities, axis=1, kind="stable")[:, : min(k, num_classes - 1)]
    np.testing.assert_array_equal(nearest_classes(centroids, k), expected)


def test_groups_must_fill_batches():
    with pytest.raises(ValueError, match="must divide"):
        HardClassBatches(
            np.array([0, 0, 1, 1, 2, 2]),
            np.arange(6),
            np.array([[1], [0], [0]]),
            classes_per_group=2,
            classes_per_batch=3,
            images_per_class=1,
            seed=0,
        )
