"""The losses of pytorch-metric-learning, as this project sets them up, against their papers' formulas."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn

from lookalike.errors import ResourceError
from training.losses import library
from training.losses.batch_loss import BatchLoss, LossShare

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(5).repeat_interleave(4)[torch.randperm(20, generator=GENERATOR)]
NUM_ROWS = len(LABELS)


def embeddings(seed: int = 0) -> Tensor:
    noise = torch.randn(NUM_ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(noise + nn.functional.one_hot(LABELS, 6), dim=1)


def whole(loss: BatchLoss, rows: Tensor, *, step: int = 0) -> LossShare:
    return loss(rows, LABELS, share=(0, 1), step=step)


def pairs(*, of_one_class: bool) -> list[tuple[int, int]]:
    every = [(i, j) for i in range(NUM_ROWS) for j in range(NUM_ROWS) if i != j]
    return [(i, j) for i, j in every if bool(LABELS[i] == LABELS[j]) == of_one_class]


def mean_of_nonzero(values: list[Tensor]) -> Tensor:
    above = [value for value in values if value > 0]
    return torch.stack(above).mean() if above else torch.zeros(())


def slow_contrastive(rows: Tensor) -> Tensor:
    similarities = rows @ rows.T
    pull = [1.0 - similarities[i, j] for i, j in pairs(of_one_class=True)]
    push = [similarities[i, j] - 0.5 for i, j in pairs(of_one_class=False)]
    return mean_of_nonzero(pull) + mean_of_nonzero(push)


def slow_triplet(rows: Tensor, *, is_semihard: bool) -> Tensor:
    violations = []
    for i, j in pairs(of_one_class=True):
        for _, k in (pair for pair in pairs(of_one_class=False) if pair[0] == i):
            gap = (rows[i] - rows[k]).norm() - (rows[i] - rows[j]).norm()
            if gap > 0 or not is_semihard:
                violations.append((0.1 - gap).clamp(min=0))
    return mean_of_nonzero(violations)


def slow_multi_similarity(rows: Tensor) -> Tensor:
    similarities = rows @ rows.T
    losses = []
    for i in range(NUM_ROWS):
        positives = [similarities[i, j] for k, j in pairs(of_one_class=True) if k == i]
        negatives = [similarities[i, j] for k, j in pairs(of_one_class=False) if k == i]
        hardest_positive, hardest_negative = min(positives), max(negatives)
        kept_positives = [s for s in positives if s - 0.1 < hardest_negative]
        kept_negatives = [s for s in negatives if s + 0.1 > hardest_positive]
        pull = sum((torch.exp(-2 * (s - 0.5)) for s in kept_positives), torch.zeros(()))
        push = sum((torch.exp(50 * (s - 0.5)) for s in kept_negatives), torch.zeros(()))
        losses.append(torch.log1p(pull) / 2 + torch.log1p(push) / 50)
    return torch.stack(losses).mean()


CLASSES = torch.arange(5)


def slow_proxy_nca(rows: Tensor, proxies: Tensor) -> Tensor:
    distances = (rows[:, None] - nn.functional.normalize(proxies, dim=1)).square().sum(2)
    return nn.functional.cross_entropy(-9 * distances, LABELS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["contrastive", "triplet", "triplet, semihard", "multi_similarity"])
def test_value_and_gradient_are_those_of_the_formula(name: str, seed: int) -> None:
    loss, formula = {
        "contrastive": (
            library.contrastive_loss(positive_margin=1.0, negative_margin=0.5, memory_size=None, start_step=0, dim=6),
            slow_contrastive,
        ),
        "triplet": (
            library.triplet_loss(margin=0.1, triplets="all"),
            lambda rows: slow_triplet(rows, is_semihard=False),
        ),
        "triplet, semihard": (
            library.triplet_loss(margin=0.1, triplets="semihard"),
            lambda rows: slow_triplet(rows, is_semihard=True),
        ),
        "multi_similarity": (
            library.multi_similarity_loss(positive_scale=2.0, negative_scale=50.0, boundary=0.5, mining_margin=0.1),
            slow_multi_similarity,
        ),
    }[name]
    rows = embeddings(seed).requires_grad_(True)
    expected = formula(nn.functional.normalize(rows, dim=1))
    expected.backward()
    found = whole(loss, rows.detach())
    assert float(expected.detach()) > 0
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.gradient, rows.grad, rtol=1e-6, atol=1e-9)


def test_proxies_follow_the_formula_and_receive_a_gradient() -> None:
    loss = library.proxy_nca_loss(scale=9.0, classes=CLASSES, dim=6, lr_multiplier=100.0)
    (proxies,) = loss.parameters()
    rows = embeddings().requires_grad_(True)
    found = whole(loss, rows.detach())
    own = proxies.detach().clone().requires_grad_(True)
    expected = slow_proxy_nca(nn.functional.normalize(rows, dim=1), own)
    expected.backward()
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found.gradient, rows.grad)
    torch.testing.assert_close(proxies.grad, own.grad)
    assert loss.lr_multiplier == 100.0


@pytest.mark.parametrize("make", [library.proxy_nca_loss, library.normalised_softmax_loss])
def test_losses_with_classes_take_the_labels_of_any_shard_set(make: object) -> None:
    width = {"scale": 9.0} if make is library.proxy_nca_loss else {"temperature": 0.05}
    results = []
    for factor in (1, 7):
        torch.manual_seed(0)
        loss = make(classes=CLASSES * factor + 2, dim=6, lr_multiplier=1.0, **width)  # type: ignore[operator]
        results.append(loss(embeddings(), LABELS * factor + 2, share=(0, 1), step=0).loss)
    assert torch.equal(*results)


def memory_loss(start_step: int = 0) -> BatchLoss:
    return library.contrastive_loss(
        positive_margin=1.0, negative_margin=0.5, memory_size=30, start_step=start_step, dim=6
    )


def test_a_memory_adds_the_pairs_with_earlier_batches() -> None:
    loss = memory_loss()
    first, second = embeddings(0), embeddings(1)
    whole(loss, first)
    # 30 places: the batch itself and the last 10 rows of the one before... the oldest 10 were overwritten.
    rows, labels = torch.cat([second, first[10:]]), torch.cat([LABELS, LABELS[10:]])
    similarities = second @ rows.T
    is_one_class = LABELS[:, None] == labels
    is_itself = torch.arange(NUM_ROWS)[:, None] == torch.arange(30)
    pull = (1 - similarities)[is_one_class & ~is_itself]
    push = (similarities - 0.5)[~is_one_class]
    expected = pull[pull > 0].mean() + push[push > 0].mean()
    torch.testing.assert_close(whole(loss, second, step=1).loss, expected)
    assert float(whole(memory_loss(start_step=5), second).loss) == pytest.approx(float(slow_contrastive(second)))


def test_a_resumed_memory_goes_on_to_the_bit() -> None:
    undisturbed, killed, resumed = memory_loss(), memory_loss(), memory_loss()
    for step in range(2):
        whole(undisturbed, embeddings(step).float(), step=step)
        whole(killed, embeddings(step).float(), step=step)
    resumed.load_state_dict(killed.state_dict())
    for step in (2, 3):
        expected = whole(undisturbed, embeddings(step).float(), step=step)
        found = whole(resumed, embeddings(step).float(), step=step)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.gradient, expected.gradient)


def test_sampled_triplets_depend_on_seed_and_step_alone() -> None:
    def loss_of(seed: int, step: int) -> float:
        options = {"margin": 0.2, "boundary": 1.2, "learns_boundary": False, "lr_multiplier": 1.0}
        loss = library.margin_loss(**options, triplets="distance_weighted", seed=seed)  # type: ignore[arg-type]
        torch.manual_seed(int(torch.randint(100, ())))  # whatever was drawn before
        return float(whole(loss, embeddings(), step=step).loss)

    assert loss_of(0, 3) == loss_of(0, 3)
    assert len({loss_of(0, 3), loss_of(0, 4), loss_of(1, 3)}) == 3


def test_fast_ap_is_near_0_for_a_perfect_ranking_and_worse_for_a_random_one() -> None:
    loss = library.fast_ap_loss(num_bins=10)
    perfect = nn.functional.one_hot(LABELS, 6).double()
    assert float(whole(loss, perfect).loss) == pytest.approx(0, abs=1e-9)
    assert float(whole(loss, embeddings()).loss) > 0.1
    assert loss.floor(LABELS, step=0) is None


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"lookalike\[compared\]"):
        library.fast_ap_loss(num_bins=10)


def test_a_loss_without_violations_has_no_gradient() -> None:
    loss = library.triplet_loss(margin=0.1, triplets="all")
    found = whole(loss, nn.functional.one_hot(LABELS, 6).double())
    assert float(found.loss) == 0.0
    assert not found.gradient.any()
    assert math.isclose(loss.floor(LABELS, step=0) or 0.0, 0.0)
