"""Smooth and blackbox average precision against their formulas, query by query, and what all rank losses promise."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from training.losses import blackbox_ap as blackbox
from training.losses import mixing_coefficients, mixing_pairs, query_plan, smooth_ranks
from training.losses.batch_rank_loss import batch_rank_loss
from training.losses.blackbox_ap import (
    blackbox_average_precision,
    blackbox_average_precision_with_gradient,
)
from training.losses.mixing import PairMixing
from training.losses.rank_statistics import RankStatistics
from training.losses.recall_at_k import recall_at_k_with_gradient
from training.losses.smooth_ap import (
    smooth_average_precision,
    smooth_average_precision_with_gradient,
)
from training.losses.smooth_ranks import LossAtRanks

RAGGED_LABELS = torch.tensor([7, 2, 7, 5, 2, 9, 7, 2, 5, 3, 7, 7])  # 5, 3 and 2 images, two classes of one


def slow_smooth_average_precision(embeddings, labels, *, rank_temperature=0.01, mixing=None):
    if mixing is not None:
        first, second = mixing_pairs(labels).unbind(1)
        virtual = mixing[:, None] * embeddings[first] + (1 - mixing)[:, None] * embeddings[second]
        embeddings, labels = torch.cat([embeddings, virtual]), torch.cat([labels, labels[first]])
    losses = []
    for query, row in enumerate(embeddings @ embeddings.T):
        others = [z for z in range(len(row)) if z != query]
        positives = [z for z in others if labels[z] == labels[query]]
        precisions = []
        for x in positives:
            above = lambda zs, x=x: 1 + sum(torch.sigmoid((row[z] - row[x]) / rank_temperature) for z in zs if z != x)  # noqa: E731, B023
            precisions.append(above(positives) / above(others))
        if positives:
            losses.append(1 - torch.stack(precisions).mean())
    return torch.stack(losses).mean()


class HardRanks(torch.autograd.Function):
    """Places of a list in descending order; the gradient is how they change under pushed scores. Algorithm 1."""

    @staticmethod
    def forward(ctx, scores, interpolation):
        ranks = HardRanks.ranks_of(scores)
        ctx.save_for_backward(scores, ranks)
        ctx.interpolation = interpolation
        return ranks

    @staticmethod
    def backward(ctx, gradient):
        scores, ranks = ctx.saved_tensors
        pushed = HardRanks.ranks_of(scores + ctx.interpolation * gradient)
        return -(ranks - pushed) / ctx.interpolation, None

    @staticmethod
    def ranks_of(scores):
        return torch.argsort(torch.argsort(scores, descending=True, stable=True)).to(scores.dtype) + 1


def slow_blackbox_average_precision(embeddings, labels, *, interpolation=4.0, margin=0.02):
    losses = []
    for query, row in enumerate(embeddings @ embeddings.T):
        is_other = torch.arange(len(labels)) != query
        # Negatives first, as they come first at ties.
        scores = torch.cat(
            [
                row[is_other & (labels != labels[query])] + margin / 2,
                row[is_other & (labels == labels[query])] - margin / 2,
            ]
        )
        num_positives = int((is_other & (labels == labels[query])).sum())
        if num_positives:
            ranks = HardRanks.apply(scores, interpolation)[-num_positives:]
            among_positives = HardRanks.ranks_of(scores[-num_positives:].detach())
            losses.append(1 - (among_positives / ranks).mean())
    return torch.stack(losses).mean()


LOSSES = {
    "smooth": (smooth_average_precision, slow_smooth_average_precision),
    "blackbox": (blackbox_average_precision, slow_blackbox_average_precision),
}


def value_and_gradient(loss, embeddings, labels, **options):
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels, **options)
    value.backward()
    return value.detach(), leaf.grad


def assert_same(actual, expected, *, value=1e-12, gradient=1e-10):
    """The defaults are far below any float32 result and 1000 times the round-off seen in float64."""
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=value)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=gradient)


def embeddings_of(labels, *, dim=16, noise=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(int(labels.max()) + 1, dim, generator=generator, dtype=dtype)
    noises = noise * torch.randn(len(labels), dim, generator=generator, dtype=dtype)
    return functional.normalize(centers[labels] + noises, dim=1)


@pytest.fixture(params=["sparse", "dense"])
def only_one_path(request, monkeypatch):
    monkeypatch.setattr(query_plan, "MAX_SPARSE_SHARE", {"sparse": 1.0, "dense": -1.0}[request.param])
    monkeypatch.setattr(query_plan, "_BLOCK_ENTRIES_CPU", 1)
    monkeypatch.setattr(query_plan, "_MIN_BLOCK_QUERIES", 3)
    monkeypatch.setattr(smooth_ranks, "_COMPARISONS", 40)


@pytest.mark.parametrize("rank_temperature", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.usefixtures("only_one_path")
def test_smooth_ap_equals_the_formula(rank_temperature, is_mixed, noise):
    mixing = mixing_coefficients(RAGGED_LABELS, seed=1, step=2).double() if is_mixed else None
    options = {"rank_temperature": rank_temperature, "mixing": mixing}
    embeddings = embeddings_of(RAGGED_LABELS, noise=noise)
    assert_same(
        value_and_gradient(smooth_average_precision, embeddings, RAGGED_LABELS, **options),
        value_and_gradient(slow_smooth_average_precision, embeddings, RAGGED_LABELS, **options),
    )


def test_smooth_ap_by_hand():
    """Query 0: a negative ahead of its only positive, r = 2 and r₊ = 1. Query 1: a tie between them, r = 1.5."""
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    loss = smooth_average_precision(embeddings, torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(1 - (1 / 2 + 1 / 1.5) / 2, abs=1e-12)


@pytest.mark.parametrize("interpolation", [0.5, 4.0, 40.0])
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_blackbox_ap_equals_ranking_again(interpolation, margin, noise, monkeypatch):
    monkeypatch.setattr(blackbox, "_BLOCK_ENTRIES", 40)
    options = {"interpolation": interpolation, "margin": margin}
    embeddings = embeddings_of(RAGGED_LABELS, noise=noise)
    actual = value_and_gradient(blackbox_average_precision, embeddings, RAGGED_LABELS, **options)
    assert_same(actual, value_and_gradient(slow_blackbox_average_precision, embeddings, RAGGED_LABELS, **options))
    # A push of 40 overtakes something wherever the loss is not 0.
    assert interpolation < 40 or bool(actual[1].any()) == (actual[0] > 0)


def test_blackbox_ap_puts_negatives_first_at_ties():
    embeddings = torch.ones(3, 2, dtype=torch.float64)
    # One positive and one negative, alike: the positive comes second.
    loss = blackbox_average_precision(embeddings, torch.tensor([0, 0, 1]), margin=0.0)
    assert loss.item() == 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_zero_at_a_perfect_ranking(name):
    labels = torch.arange(40) // 4
    options = {"rank_temperature": 1e-9} if name == "smooth" else {}
    value, gradient = value_and_gradient(LOSSES[name][0], embeddings_of(labels, noise=0.05), labels, **options)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert name == "smooth" or not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_workers", [2, 3, 17])
def test_shares_of_workers_sum_to_the_whole(name, num_workers):
    embeddings, loss = embeddings_of(RAGGED_LABELS), LOSSES[name][0]
    whole = value_and_gradient(loss, embeddings, RAGGED_LABELS)
    shares = [
        value_and_gradient(loss, embeddings, RAGGED_LABELS, query_share=(worker, num_workers))
        for worker in range(num_workers)
    ]
    assert_same((sum(value for value, _ in shares), sum(gradient for _, gradient in shares)), whole, gradient=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_rows_does_not_matter(name):
    embeddings, loss = embeddings_of(RAGGED_LABELS), LOSSES[name][0]
    order = torch.randperm(len(RAGGED_LABELS), generator=torch.Generator().manual_seed(3))
    value, gradient = value_and_gradient(loss, embeddings, RAGGED_LABELS)
    shuffled = value_and_gradient(loss, embeddings[order], RAGGED_LABELS[order])
    assert_same(shuffled, (value, gradient[order]), gradient=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_positives_has_loss_and_gradient_zero(name):
    labels = torch.arange(5)
    value, gradient = value_and_gradient(LOSSES[name][0], embeddings_of(labels), labels)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_even_under_autocast(name, dtype):
    labels = torch.arange(64) // 4
    loss, embeddings = LOSSES[name][0], embeddings_of(labels, dtype=torch.float32).to(dtype)
    expected_value, expected_gradient = value_and_gradient(loss, embeddings.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(loss, embeddings, labels)
    assert value.dtype == torch.float32
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient.to(dtype))


class _LargestTensor(TorchDispatchMode):
    num_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.num_entries = max([self.num_entries, *(one.numel() for one in tensors if isinstance(one, torch.Tensor))])
        return result


@pytest.mark.parametrize("function", [smooth_average_precision_with_gradient, blackbox_average_precision_with_gradient])
def test_no_tensor_grows_with_the_square_of_the_batch(function, monkeypatch):
    monkeypatch.setattr(query_plan, "_BLOCK_ENTRIES_CPU", 1)
    monkeypatch.setattr(blackbox, "_BLOCK_ENTRIES", 32 * 256)
    labels = torch.arange(256) // 4
    embeddings = embeddings_of(labels, dtype=torch.float32)
    with _LargestTensor() as largest:
        function(embeddings, labels)
    assert largest.num_entries <= 32 * 256


def test_a_new_function_of_ranks_takes_a_few_lines():
    """Mean reciprocal rank over positives, against autograd through the formula."""

    def reciprocal_rank(at):
        share = at.is_positive.double() / at.is_positive.sum(1, keepdim=True)
        return LossAtRanks(losses=1 - (share / at.among_all).sum(1), slopes=share / at.among_all**2)

    embeddings = embeddings_of(RAGGED_LABELS).requires_grad_()
    losses = []
    for query, row in enumerate(embeddings @ embeddings.T):
        positives = [z for z in range(12) if RAGGED_LABELS[z] == RAGGED_LABELS[query] and z != query]
        ranks = [
            1 + sum(torch.sigmoid((row[z] - row[x]) / 0.01) for z in range(12) if z not in (x, query))
            for x in positives
        ]
        if positives:
            losses.append(1 - torch.stack([1 / rank for rank in ranks]).mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    result = batch_rank_loss(embeddings.detach(), RAGGED_LABELS, reciprocal_rank, rank_temperature=0.01)
    assert_same((result.loss, result.gradient), (expected.detach(), embeddings.grad))


def test_statistics_of_workers_add_up_to_those_of_the_batch():
    labels = torch.arange(256) // 4
    embeddings = embeddings_of(labels, noise=2.0)
    whole = recall_at_k_with_gradient(embeddings, labels).statistics
    parts = [recall_at_k_with_gradient(embeddings, labels, query_share=(worker, 3)).statistics for worker in range(3)]
    total = parts[0] + parts[1] + parts[2]
    assert total.num_in_window == pytest.approx(whole.num_in_window, rel=1e-9)
    assert (total.num_queries, total.num_live_queries, total.num_comparisons, total.rank_histogram) == (
        whole.num_queries,
        whole.num_live_queries,
        whole.num_comparisons,
        whole.rank_histogram,
    )
    assert 0 < whole.live_fraction <= 1
    assert 0 < whole.window_fraction < 1


@pytest.mark.parametrize("share", [1.0, -1.0])
def test_statistics_count_what_the_formula_counts(share, monkeypatch):
    monkeypatch.setattr(query_plan, "MAX_SPARSE_SHARE", share)
    labels = torch.arange(64) // 4
    embeddings = embeddings_of(labels, noise=1.5)
    similarities = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    steepness, bins = 0.0, torch.zeros(7, dtype=torch.int64)
    for query in range(64):
        for x in (labels == labels[query]).nonzero().flatten().tolist():
            if x != query:
                above = torch.sigmoid((similarities[query] - similarities[query, x]) / 0.01)
                steepness += float((4 * above * (1 - above)).sum())
                bins[int((above.sum() + 0.5).round().log2())] += 1
    # Smooth AP, because every positive has a slope there.
    statistics = smooth_average_precision_with_gradient(embeddings, labels).statistics
    assert statistics.rank_histogram == tuple(bins.tolist())
    assert statistics.num_comparisons == 64 * 3 * 64
    assert statistics.num_in_window == pytest.approx(steepness, rel=1e-9)


def test_statistics_of_batches_of_different_sizes_add_up():
    one = RankStatistics(4, 2, 10, 1.5, (1, 2))
    assert one + RankStatistics(6, 3, 20, 0.5, (1, 2, 3)) == RankStatistics(10, 5, 30, 2.0, (2, 4, 3))


def test_mixing_some_pairs_is_a_batch_with_only_those_virtual_samples():
    pairs = mixing_pairs(RAGGED_LABELS)[::3]
    coefficients = torch.linspace(0.1, 0.9, len(pairs), dtype=torch.float64)
    embeddings = embeddings_of(RAGGED_LABELS).requires_grad_()
    virtual = coefficients[:, None] * embeddings[pairs[:, 0]] + (1 - coefficients[:, None]) * embeddings[pairs[:, 1]]
    expected = slow_smooth_average_precision(
        torch.cat([embeddings, virtual]), torch.cat([RAGGED_LABELS, RAGGED_LABELS[pairs[:, 0]]])
    )
    expected.backward()
    result = smooth_average_precision_with_gradient(
        embeddings.detach(), RAGGED_LABELS, mixing=PairMixing(pairs, coefficients)
    )
    assert_same((result.loss, result.gradient), (expected.detach(), embeddings.grad))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (smooth_average_precision, {"rank_temperature": 0.0}, "rank_temperature"),
        (smooth_average_precision, {"mixing": torch.full((14,), 2.0)}, r"\[0, 1\]"),
        (smooth_average_precision, {"query_share": (1, 1)}, "query_share"),
        (blackbox_average_precision, {"interpolation": 0.0}, "interpolation"),
        (blackbox_average_precision, {"interpolation": float("nan")}, "interpolation"),
        (blackbox_average_precision, {"margin": -0.1}, "margin"),
        (blackbox_average_precision, {"query_share": (1, 1)}, "query_share"),
    ],
)
def test_bad_options_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(embeddings_of(RAGGED_LABELS), RAGGED_LABELS, **options)
