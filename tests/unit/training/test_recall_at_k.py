"""The fused loss against stored values of the paper's released code, and against the formula written out slowly."""

import json
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from training.losses import (
    mixing_coefficients,
    mixing_pairs,
    query_plan,
    recall_at_k_surrogate,
    recall_at_k_with_gradient,
    similarities,
    surrogate_floor,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "recall_at_k_surrogate.json").read_text())
DEFINITIONS = ("paper", "released")
RAGGED_LABELS = torch.tensor([7, 2, 7, 5, 2, 9, 7, 2, 5, 3, 7, 7])  # 5, 3 and 2 images, two classes of one


def slow_surrogate(
    embeddings,
    labels,
    *,
    ks=(1, 2, 4, 8, 16),
    rank_temperature=0.01,
    k_temperature=1.0,
    definition="paper",
    mixing=None,
):
    """The formula, query by query, with virtual samples as embeddings."""
    batch = len(labels)
    if mixing is not None:
        first, second = mixing_pairs(labels).unbind(1)
        virtual = mixing[:, None] * embeddings[first] + (1 - mixing)[:, None] * embeddings[second]
        embeddings, labels = torch.cat([embeddings, virtual]), torch.cat([labels, labels[first]])
    k_temperatures = k_temperature if isinstance(k_temperature, list) else [k_temperature] * len(ks)
    losses = []
    for query, query_similarities in enumerate(embeddings @ embeddings.T):
        is_positive = labels == labels[query]
        is_positive[query] = False
        positives = is_positive.nonzero().squeeze(1)
        if len(positives) == 0:
            continue
        above = torch.sigmoid((query_similarities - query_similarities[positives, None]) / rank_temperature)
        is_counted = torch.arange(len(labels)) != positives[:, None]
        if definition == "paper":
            is_counted[:, query] = False
        ranks = 1 + (above * is_counted).sum(1)
        recalls = []
        for k, temperature in zip(ks, k_temperatures, strict=True):
            k = min(k, batch)
            found = torch.sigmoid((k - ranks) / temperature).sum()
            recalls.append(
                found / len(positives) if definition == "paper" else found.clamp(max=k) / min(k, len(positives))
            )
        losses.append(1 - torch.stack(recalls).mean())
    return torch.stack(losses).mean() if losses else embeddings.sum() * 0


def value_and_gradient(loss, embeddings, labels, **options):
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels, **options)
    value.backward()
    return value.detach(), leaf.grad


def assert_same(actual, expected, *, value=1e-12, gradient=1e-10):
    """The defaults are far below any float32 result and 1000 times the round-off seen in float64."""
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=value)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=gradient)


def random_embeddings(batch, dim=16, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(batch, dim, generator=generator, dtype=dtype), dim=1)


def clustered_embeddings(labels, dim=16, *, noise=0.5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(int(labels.max()) + 1, dim, generator=generator, dtype=dtype)
    noises = noise * torch.randn(len(labels), dim, generator=generator, dtype=dtype)
    return functional.normalize(centers[labels] + noises, dim=1)


@pytest.fixture(params=["sparse", "dense"])
def only_one_path(request, monkeypatch):
    """Every block through one of the two ways to its gradient, and blocks so small that a batch has several."""
    share = {"sparse": 1.0, "dense": -1.0}[request.param]
    for module in (similarities, query_plan):
        monkeypatch.setattr(module, "MAX_SPARSE_SHARE", share)
    monkeypatch.setattr(query_plan, "_BLOCK_ENTRIES_CPU", 64)
    monkeypatch.setattr(query_plan, "_MIN_BLOCK_QUERIES", 3)
    monkeypatch.setattr(similarities, "_MAX_PENDING_PAIRS", 50)


def golden_arguments(case):
    embeddings = torch.tensor(GOLDEN["inputs"][case["input"]]["embeddings"], dtype=torch.float64)
    labels = torch.tensor(GOLDEN["inputs"][case["input"]]["labels"])
    options = {
        "ks": case["ks"],
        "rank_temperature": case["rank_temperature"],
        "k_temperature": [float(temperature) for temperature in case["k_temperature"]],
    }
    if "mixing" in case:
        coefficients = {(first, second): coefficient for first, second, coefficient in case["mixing"]}
        ordered = [coefficients[first, second] for first, second in mixing_pairs(labels).tolist()]
        options["mixing"] = torch.tensor(ordered, dtype=torch.float64)
    return embeddings, labels, options


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_equals_the_stored_reference_values(definition):
    for case in GOLDEN["cases"]:
        embeddings, labels, options = golden_arguments(case)
        actual = value_and_gradient(recall_at_k_surrogate, embeddings, labels, definition=definition, **options)
        expected = case[definition]
        assert_same(
            actual,
            (
                torch.tensor(expected["loss"], dtype=torch.float64),
                torch.tensor(expected["gradient"], dtype=torch.float64),
            ),
        )


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("rank_temperature", [0.0005, 0.01, 0.1])  # the first one overflows a shared exponential
@pytest.mark.usefixtures("only_one_path")
def test_equals_the_formula_for_ragged_shuffled_classes(definition, is_mixed, rank_temperature):
    mixing = mixing_coefficients(RAGGED_LABELS, seed=1, step=2).double() if is_mixed else None
    options = {
        "definition": definition,
        "mixing": mixing,
        "rank_temperature": rank_temperature,
        "ks": (1, 3, 50),
        "k_temperature": [1.0, 0.5, 3.0],
    }
    # Not of unit length: similarities far apart.
    embeddings = 2 * random_embeddings(len(RAGGED_LABELS), dim=4)
    assert_same(
        value_and_gradient(recall_at_k_surrogate, embeddings, RAGGED_LABELS, **options),
        value_and_gradient(slow_surrogate, embeddings, RAGGED_LABELS, **options),
    )


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.usefixtures("only_one_path")
def test_equals_the_formula_for_a_learned_batch(definition):
    labels = torch.arange(32) // 4
    embeddings = clustered_embeddings(labels, noise=0.3)
    for mixing in (None, mixing_coefficients(labels, seed=0, step=0).double()):
        options = {"definition": definition, "mixing": mixing}
        assert_same(
            value_and_gradient(recall_at_k_surrogate, embeddings, labels, **options),
            value_and_gradient(slow_surrogate, embeddings, labels, **options),
        )


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_released_cut_off_at_k_has_no_gradient_beyond(definition):
    labels = torch.zeros(12, dtype=torch.int64)  # 11 positives, so a wide temperature finds more than k
    options = {"definition": definition, "ks": (1, 2), "k_temperature": 8.0}
    actual = value_and_gradient(recall_at_k_surrogate, random_embeddings(12), labels, **options)
    assert_same(actual, value_and_gradient(slow_surrogate, random_embeddings(12), labels, **options))
    assert bool((actual[1] == 0).all()) == (definition == "released")


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_exact_ties_count_one_half(definition):
    labels = torch.arange(16) // 4
    embeddings = random_embeddings(8).repeat(2, 1)  # every image also stands in another class
    embeddings[1] = embeddings[0]
    options = {"definition": definition}
    assert_same(
        value_and_gradient(recall_at_k_surrogate, embeddings, labels, **options),
        value_and_gradient(slow_surrogate, embeddings, labels, **options),
    )


def test_a_batch_of_identical_images_is_one_large_tie():
    embeddings = torch.ones(8, 4, dtype=torch.float64) / 2
    # All 7 others tie with the positive: rank 1 + 6 / 2.
    loss = recall_at_k_surrogate(embeddings, torch.arange(8) // 2, ks=(1,))
    torch.testing.assert_close(loss, 1 - torch.sigmoid(torch.tensor(1 - 4.0, dtype=torch.float64)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_batch_without_positives_has_loss_and_gradient_zero(definition, is_mixed):
    mixing = torch.zeros(0, dtype=torch.float64) if is_mixed else None
    loss, gradient = value_and_gradient(
        recall_at_k_surrogate, random_embeddings(5), torch.arange(5), definition=definition, mixing=mixing
    )
    assert loss == 0
    assert not gradient.any()
    assert surrogate_floor(torch.arange(5), definition=definition, is_mixed=is_mixed) == 0


def test_single_images_are_no_queries_but_in_the_gallery():
    labels = torch.tensor([0, 0, 1])
    embeddings = torch.eye(3, dtype=torch.float64)
    embeddings[2] = embeddings[0]
    # Query 0: the single image first, then its positive. Query 1: a tie between the two.
    expected = 1 - torch.sigmoid(1 - torch.tensor([2.0, 1.5], dtype=torch.float64)).mean()
    torch.testing.assert_close(recall_at_k_surrogate(embeddings, labels, ks=(1,)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_order_of_rows_does_not_matter(is_mixed):
    labels = RAGGED_LABELS
    embeddings = random_embeddings(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    mixing, shuffled_mixing = None, None
    if is_mixed:
        mixing = mixing_coefficients(labels, seed=0, step=0).double()
        share_of_first = {tuple(pair): share for pair, share in zip(mixing_pairs(labels).tolist(), mixing, strict=True)}
        shuffled_pairs = order[mixing_pairs(labels[order])].tolist()
        shuffled_mixing = torch.stack(
            [share_of_first[i, j] if i < j else 1 - share_of_first[j, i] for i, j in shuffled_pairs]
        )
    value, gradient = value_and_gradient(recall_at_k_surrogate, embeddings, labels, mixing=mixing)
    shuffled = value_and_gradient(recall_at_k_surrogate, embeddings[order], labels[order], mixing=shuffled_mixing)
    assert_same(shuffled, (value, gradient[order]), gradient=1e-12)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_shares_of_workers_sum_to_the_whole(definition, is_mixed, num_workers):
    embeddings = random_embeddings(len(RAGGED_LABELS))
    mixing = mixing_coefficients(RAGGED_LABELS, seed=0, step=5).double() if is_mixed else None
    options = {"definition": definition, "mixing": mixing}
    whole = value_and_gradient(recall_at_k_surrogate, embeddings, RAGGED_LABELS, **options)
    shares = [
        value_and_gradient(
            recall_at_k_surrogate, embeddings, RAGGED_LABELS, query_share=(worker, num_workers), **options
        )
        for worker in range(num_workers)
    ]
    assert_same((sum(value for value, _ in shares), sum(gradient for _, gradient in shares)), whole, gradient=1e-12)


def test_more_workers_than_queries_leaves_some_with_nothing():
    embeddings, labels = random_embeddings(4), torch.tensor([0, 0, 1, 2])
    shares = [recall_at_k_with_gradient(embeddings, labels, query_share=(worker, 5)) for worker in range(5)]
    whole = recall_at_k_with_gradient(embeddings, labels)
    torch.testing.assert_close(sum(share.loss for share in shares), whole.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(share.gradient for share in shares), whole.gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_gradient_equals_finite_differences(definition, is_mixed):
    labels = torch.tensor([0, 1, 0, 1, 0, 2])
    mixing = mixing_coefficients(labels, seed=0, step=0).double() if is_mixed else None
    embeddings = random_embeddings(6, dim=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: recall_at_k_surrogate(leaf, labels, rank_temperature=0.1, definition=definition, mixing=mixing),
        (embeddings,),
    )


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_float32_gradient_is_that_of_float64_to_its_precision(is_mixed, noise):
    labels = torch.arange(256) // 4
    embeddings = clustered_embeddings(labels, dim=64, noise=noise, dtype=torch.float32)
    mixing = mixing_coefficients(labels, seed=0, step=0) if is_mixed else None
    single = recall_at_k_with_gradient(embeddings, labels, mixing=mixing)
    double = recall_at_k_with_gradient(embeddings.double(), labels, mixing=mixing)
    assert single.loss.dtype == single.gradient.dtype == torch.float32
    torch.testing.assert_close(single.loss.double(), double.loss, rtol=1e-5, atol=0)
    # A similarity near 1 is off by 1e-7, a hundred times that where it is divided by the temperature.
    error = (single.gradient.double() - double.gradient).norm() / double.gradient.norm()
    assert error < 3e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_even_under_autocast(dtype):
    labels = torch.arange(64) // 4
    embeddings = clustered_embeddings(labels, noise=1.0, dtype=torch.float32).to(dtype)
    expected_loss, expected_gradient = value_and_gradient(recall_at_k_surrogate, embeddings.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = value_and_gradient(recall_at_k_surrogate, embeddings, labels)
    assert loss.dtype == torch.float32
    assert loss == expected_loss
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_a_loss_scale_reaches_the_gradient_before_it_is_narrowed():
    labels = torch.arange(64) // 4
    embeddings = clustered_embeddings(labels, noise=1.0, dtype=torch.float32).half()
    _, expected = value_and_gradient(recall_at_k_surrogate, embeddings.float(), labels)
    _, gradient = value_and_gradient(
        lambda leaf, labels: 2.0**20 * recall_at_k_surrogate(leaf, labels) / 2**6, embeddings, labels
    )
    assert torch.equal(gradient, (expected * 2**14).half())


def test_same_result_to_the_bit_when_repeated():
    labels = torch.arange(512) // 4
    embeddings = clustered_embeddings(labels, dim=64, noise=1.5, dtype=torch.float32)
    mixing = mixing_coefficients(labels, seed=0, step=0)
    first, second = (recall_at_k_with_gradient(embeddings, labels, mixing=mixing) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient, second.gradient)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_no_tensor_grows_with_the_square_of_the_batch(is_mixed, monkeypatch):
    monkeypatch.setattr(query_plan, "_BLOCK_ENTRIES_CPU", 1)
    labels = torch.arange(256) // 4
    num_samples = 256 * 5 // 2 if is_mixed else 256
    mixing = mixing_coefficients(labels, seed=0, step=0) if is_mixed else None
    embeddings = random_embeddings(256, dtype=torch.float32)
    with _LargestTensor() as largest:
        recall_at_k_with_gradient(embeddings, labels, mixing=mixing)
    assert largest.num_entries <= query_plan._MIN_BLOCK_QUERIES * num_samples


class _LargestTensor(TorchDispatchMode):
    num_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.num_entries = max(
            [self.num_entries, *(part.numel() for part in tensors if isinstance(part, torch.Tensor))]
        )
        return result


def test_without_a_graph_only_the_loss_is_worked_out():
    embeddings, labels = random_embeddings(12), RAGGED_LABELS
    expected = recall_at_k_surrogate(embeddings.requires_grad_(), labels)
    with torch.no_grad():
        loss = recall_at_k_surrogate(embeddings, labels)
    assert not loss.requires_grad
    assert loss == expected.detach()
    assert recall_at_k_with_gradient(embeddings.detach(), labels, with_gradient=False).gradient is None


def test_a_gradient_of_the_gradient_is_refused():
    embeddings = random_embeddings(12).requires_grad_()
    loss = recall_at_k_surrogate(embeddings, RAGGED_LABELS)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


def test_live_fraction_tells_a_batch_that_teaches_from_one_that_does_not():
    labels = torch.arange(1024) // 2
    assert recall_at_k_with_gradient(clustered_embeddings(labels), labels, ks=(1,)).live_fraction > 0.9
    assert recall_at_k_with_gradient(random_embeddings(1024), labels, ks=(1,)).live_fraction < 0.2


# Not "released" with mixing: there a query ranks itself, and a virtual one not first, so nothing reaches the floor.
@pytest.mark.parametrize(("definition", "is_mixed"), [("paper", False), ("paper", True), ("released", False)])
def test_floor_is_the_loss_of_a_perfect_ranking(definition, is_mixed):
    labels = torch.arange(120) // 4
    labels[:50] = torch.arange(50) // 5
    labels[119] = 30  # alone
    mixing = mixing_coefficients(labels, seed=0, step=0).double() if is_mixed else None
    # Far apart classes and a temperature that makes ranks whole numbers.
    loss = recall_at_k_surrogate(
        clustered_embeddings(labels, dim=64, noise=0.05),
        labels,
        rank_temperature=1e-11,
        definition=definition,
        mixing=mixing,
    )
    assert loss.item() == pytest.approx(surrogate_floor(labels, definition=definition, is_mixed=is_mixed), abs=1e-6)


def test_floor_of_four_images_per_class():
    """By hand: ranks 1, 2, 3 of the paper, one more each in the released code."""
    labels = torch.arange(64) // 4
    sigmoid = lambda x: 1 / (1 + 2.718281828459045**-x)  # noqa: E731
    paper = 1 - sum(sigmoid(k - rank) / 3 for k in (1, 2) for rank in (1, 2, 3)) / 2
    released = 1 - sum(min(sum(sigmoid(k - rank) for rank in (2, 3, 4)), k) / min(k, 3) for k in (1, 2)) / 2
    assert surrogate_floor(labels, ks=(1, 2)) == pytest.approx(paper, abs=1e-12)
    assert surrogate_floor(labels, ks=(1, 2), definition="released") == pytest.approx(released, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, "ks must"),
        ({"ks": (0, 1)}, "ks must"),
        ({"rank_temperature": 0.0}, "rank_temperature"),
        ({"rank_temperature": float("nan")}, "rank_temperature"),
        ({"k_temperature": -1.0}, "k_temperature"),
        ({"k_temperature": [1.0, float("inf")], "ks": (1, 2)}, "k_temperature"),
        ({"k_temperature": [1.0]}, "one per k"),
        ({"mixing": torch.full((13,), 0.5)}, "14 pairs"),
        ({"mixing": torch.full((14,), 1.5)}, r"\[0, 1\]"),
        ({"mixing": torch.full((14,), float("nan"))}, r"\[0, 1\]"),
        ({"query_share": (2, 2)}, "query_share"),
        ({"query_share": (0, 0)}, "query_share"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k_surrogate(random_embeddings(12), RAGGED_LABELS, **changes)


@pytest.mark.parametrize(
    ("embeddings", "labels", "options"),
    [
        (torch.ones(4, 2), torch.zeros(3, dtype=torch.int64), {}),
        (torch.ones(4), torch.zeros(4, dtype=torch.int64), {}),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.int64), {}),
        (torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), {}),
        (torch.ones(4, 2), torch.zeros(4), {}),
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), {"definition": "official"}),
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), {"mixing": torch.zeros(2, 3)}),
    ],
)
def test_bad_inputs_are_refused(embeddings, labels, options):
    # With annotations checked at run time, as in this project's test run, they are refused one step earlier.
    with pytest.raises((ValueError, TypeCheckError)):
        recall_at_k_surrogate(embeddings, labels, **options)
