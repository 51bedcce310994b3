"""Which pairs are mixed, with coefficients that depend on nothing but seed, step, class and slots."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from tests.unit.training.small_runs import CLASSES
from training.loss_registry import create_loss
from training.loss_settings import LossSettings
from training.losses import mixing_coefficients, mixing_pairs
from training.losses.mixing import draw_mixing, mix
from training.losses.recall_at_k import recall_at_k_with_gradient, surrogate_floor
from training.losses.smooth_ap import smooth_average_precision_with_gradient

LABELS = torch.tensor([7, 2, 7, 5, 2, 9, 7, 2, 5, 3, 7, 7])


def coefficients_by_slots(labels, rows, *, seed, step):
    """By (label, slot, slot), slots counted in the order of `rows`, which name a batch's rows in some order."""
    labels = labels[rows]
    slots = [int((labels[:row] == label).sum()) for row, label in enumerate(labels)]
    pairs = mixing_pairs(labels).tolist()
    coefficients = mixing_coefficients(labels, seed=seed, step=step).tolist()
    return {(int(labels[i]), slots[i], slots[j]): a for (i, j), a in zip(pairs, coefficients, strict=True)}


def test_pairs_are_all_pairs_of_one_class_in_ascending_order():
    expected = [[i, j] for i, j in itertools.combinations(range(len(LABELS)), 2) if LABELS[i] == LABELS[j]]
    assert mixing_pairs(LABELS).tolist() == expected


def test_four_images_per_class_grow_a_batch_two_and_a_half_times():
    assert len(mixing_pairs(torch.arange(64) // 4)) == 64 * 3 // 2


@pytest.mark.parametrize(
    "labels", [torch.arange(5), torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
)
def test_without_two_images_of_a_class_there_is_nothing_to_mix(labels):
    assert mixing_pairs(labels).shape == (0, 2)
    assert mixing_coefficients(labels, seed=0, step=0).shape == (0,)


def test_coefficients_follow_class_and_slots_wherever_rows_lie():
    in_order = coefficients_by_slots(LABELS, torch.arange(12), seed=3, step=4)
    for rows in (torch.arange(11, -1, -1), torch.argsort(LABELS, stable=True), torch.arange(12).roll(5)):
        assert coefficients_by_slots(LABELS, rows, seed=3, step=4) == in_order
    # Other classes in the batch change nothing either.
    alone = coefficients_by_slots(LABELS, (LABELS == 7).nonzero().squeeze(1), seed=3, step=4)
    assert alone.items() <= in_order.items()


def test_coefficients_are_new_for_every_seed_step_class_and_pair():
    labels = torch.arange(64) // 4
    draws = torch.stack([mixing_coefficients(labels, seed=seed, step=step) for seed in range(4) for step in range(4)])
    # 1536 draws of 2^23 values: a chance of 13 % for one pair alike; these draws have none.
    assert len(draws.unique()) == draws.numel()


def test_coefficients_leave_the_global_generators_alone():
    state = torch.get_rng_state()
    torch.manual_seed(0)
    first = mixing_coefficients(LABELS, seed=0, step=0)
    torch.manual_seed(1)
    assert torch.equal(mixing_coefficients(LABELS, seed=0, step=0), first)
    torch.set_rng_state(state)


def test_coefficients_are_uniform_between_0_and_1():
    draws = mixing_coefficients(torch.arange(20_000) // 4, seed=0, step=0).double()
    assert draws.min() > 0
    assert draws.max() < 1
    # Kolmogorov-Smirnov distance: 1.63 / sqrt(n) is exceeded once in 100 such batches.
    steps = torch.arange(1, len(draws) + 1, dtype=torch.float64) / len(draws)
    assert (draws.sort().values - steps).abs().max() < 1.63 / len(draws) ** 0.5


def test_coefficients_stay_what_they_are():
    """Pinned: a resumed run relies on them. To renew: print the list below, and say so in the changelog."""
    labels = torch.tensor([0, 0, 0, -5, -5])
    assert mixing_coefficients(labels, seed=1, step=2).tolist() == PINNED


PINNED_BETA = [0.06833217293024063, 0.41538122296333313, 0.9373890161514282, 0.05783708021044731]
PINNED = [0.20467668771743774, 0.45373302698135376, 0.8025622963905334, 0.19110840559005737]


@pytest.mark.parametrize("arguments", [{"seed": -1, "step": 0}, {"seed": 0, "step": -1}, {"seed": 2**63, "step": 0}])
def test_seeds_and_steps_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="between 0 and"):
        mixing_coefficients(LABELS, **arguments)


def test_mixed_similarities_are_those_of_mixed_embeddings():
    embeddings = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = mixing_pairs(LABELS)
    coefficients = mixing_coefficients(LABELS, seed=0, step=0).double()
    mixture = mix(pairs, coefficients, num_images=12)
    virtual = coefficients[:, None] * embeddings[pairs[:, 0]] + (1 - coefficients[:, None]) * embeddings[pairs[:, 1]]
    torch.testing.assert_close(mixture.expansion().times(embeddings), torch.cat([embeddings, virtual]))
    # The way back is the transpose: <W x, y> = <x, Wᵀ y>.
    samples = torch.randn(12 + len(pairs), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forth = (mixture.expansion().times(embeddings) * samples).sum()
    back = (embeddings * mixture.reduction(num_images=12).times(samples)).sum()
    torch.testing.assert_close(forth, back)


def test_drawing_all_pairs_uniformly_draws_the_numbers_of_mixing_coefficients():
    drawn = draw_mixing(LABELS, seed=3, step=4)
    assert torch.equal(drawn.pairs, mixing_pairs(LABELS))
    assert torch.equal(drawn.coefficients, mixing_coefficients(LABELS, seed=3, step=4))


def test_a_share_keeps_some_pairs_and_their_coefficients():
    labels = torch.arange(4000) // 4
    every = draw_mixing(labels, seed=3, step=4, beta=(0.5, 2.0))
    some = draw_mixing(labels, seed=3, step=4, beta=(0.5, 2.0), share=0.25)
    coefficient_of = {tuple(pair): a for pair, a in zip(every.pairs.tolist(), every.coefficients.tolist(), strict=True)}
    for pair, coefficient in zip(some.pairs.tolist(), some.coefficients.tolist(), strict=True):
        assert coefficient_of[tuple(pair)] == coefficient
    # 6000 pairs at 1/4 each: 1500, give or take 5 standard deviations of 33.5.
    assert abs(len(some.pairs) - 1500) < 168
    # Which pairs are used says nothing about their coefficients: means of 0.2, give or take 5 of 0.214 / sqrt(1500).
    assert abs(float(some.coefficients.mean()) - 0.2) < 5 * 0.214 / 1500**0.5
    assert len(draw_mixing(labels, seed=3, step=4, share=0.0).pairs) == 0


def test_which_pairs_are_used_follows_class_and_slots_wherever_rows_lie():
    labels = torch.arange(64) // 4
    for rows in (torch.arange(63, -1, -1), torch.arange(64).roll(5)):
        chosen = []
        for order in (torch.arange(64), rows):
            placed = labels[order]
            slots = [int((placed[:row] == label).sum()) for row, label in enumerate(placed)]
            drawn = draw_mixing(placed, seed=3, step=4, share=0.5)
            chosen.append({(int(placed[i]), slots[i], slots[j]) for i, j in drawn.pairs.tolist()})
        assert chosen[0] == chosen[1]


@pytest.mark.parametrize("beta", [(0.2, 0.2), (0.5, 0.5), (1.0, 1.0), (2.0, 5.0), (0.1, 3.0), (200.0, 100.0)])
def test_coefficients_follow_the_beta_distribution(beta):
    draws = draw_mixing(torch.arange(40_000) // 4, seed=0, step=0, beta=beta).coefficients.double()
    assert ((draws >= 0) & (draws <= 1)).all()
    generator = np.random.Generator(np.random.PCG64(0))
    expected = torch.from_numpy(generator.beta(*beta, size=len(draws)).astype(np.float32)).double()
    both = torch.cat([draws, expected])
    ecdf = [torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (draws, expected)]
    # Two samples' Kolmogorov-Smirnov distance: 1.63 sqrt(2 / n) is exceeded once in 100 such draws.
    assert (ecdf[0] - ecdf[1]).abs().max() < 1.63 * (2 / len(draws)) ** 0.5


def test_beta_coefficients_stay_what_they_are():
    """Pinned, as the uniform ones. To 1e-6: logarithms may differ in the last bit between machines."""
    labels = torch.tensor([0, 0, 0, -5, -5])
    assert draw_mixing(labels, seed=1, step=2, beta=(0.4, 0.4)).coefficients.tolist() == pytest.approx(
        PINNED_BETA, abs=1e-6
    )


def test_floor_of_a_batch_with_some_pairs_mixed_counts_those():
    labels = torch.arange(32) // 4
    every, none = draw_mixing(labels, seed=0, step=0), draw_mixing(labels, seed=0, step=0, share=0.0)
    assert surrogate_floor(labels, mixing=every) == surrogate_floor(labels, is_mixed=True)
    assert surrogate_floor(labels, mixing=none) == surrogate_floor(labels)
    some = draw_mixing(labels, seed=0, step=0, share=0.5)
    joined = torch.cat([labels, labels[some.pairs[:, 0]]])
    assert surrogate_floor(labels, mixing=some) == pytest.approx(surrogate_floor(joined), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share"),
        ({"share": float("nan")}, "share"),
        ({"beta": (0.0, 1.0)}, "beta"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_mixing_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_mixing(LABELS, **({"seed": 0, "step": 0} | options))


@pytest.mark.parametrize("name", ["recall_at_k", "smooth_ap"])
def test_mixing_some_pairs_is_the_loss_of_these_pairs(name: str) -> None:
    tree = {"name": name, "mixes_similarities": True, "mixing": {"share": 0.5, "beta": [2.0, 2.0]}}
    loss = create_loss(TypeAdapter(LossSettings).validate_python(tree), dim=8, classes=CLASSES, seed=3)
    labels = torch.arange(24) // 4
    embeddings = torch.nn.functional.normalize(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    mixing = draw_mixing(labels, seed=3, step=7, share=0.5, beta=(2.0, 2.0))
    assert 0 < len(mixing.pairs) < len(mixing_pairs(labels))
    function = recall_at_k_with_gradient if name == "recall_at_k" else smooth_average_precision_with_gradient
    expected = function(embeddings, labels, rank_temperature=0.01, mixing=mixing)
    found = loss(embeddings, labels, share=(0, 1), step=7)
    assert torch.equal(found.loss, expected.loss)
    assert expected.gradient is not None
    assert torch.equal(found.gradient, expected.gradient)
    floor = surrogate_floor(labels, mixing=mixing) if name == "recall_at_k" else 0.0
    assert loss.floor(labels, step=7) == floor
    assert floor <= float(found.loss)
