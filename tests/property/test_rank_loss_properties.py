"""Whatever the classes: the fused rank loss is the formula, and its shares sum to the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.losses import mixing_pairs, query_plan, recall_at_k_surrogate, similarities


@st.composite
def batches(draw):
    """Embeddings, labels in any order, and options of the loss; some images twice, some classes of one image."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(len(sizes), 6, generator=generator, dtype=torch.float64)
    noise = draw(st.sampled_from([0.2, 1.0, 5.0]))
    embeddings = centers[labels] + noise * torch.randn(len(labels), 6, generator=generator, dtype=torch.float64)
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    if draw(st.booleans()):
        embeddings[-1] = embeddings[0]
    options = {
        "definition": draw(st.sampled_from(["paper", "released"])),
        "ks": draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)),
        "rank_temperature": draw(st.sampled_from([0.001, 0.01, 0.1])),
        "k_temperature": draw(st.sampled_from([0.3, 1.0, 5.0])),
    }
    if draw(st.booleans()):
        options["mixing"] = torch.rand(len(mixing_pairs(labels)), generator=generator, dtype=torch.float64)
    return embeddings, labels, options


def slow_surrogate(embeddings, labels, *, definition, ks, rank_temperature, k_temperature, mixing=None):
    batch = len(labels)
    if mixing is not None:
        first, second = mixing_pairs(labels).unbind(1)
        virtual = mixing[:, None] * embeddings[first] + (1 - mixing)[:, None] * embeddings[second]
        embeddings, labels = torch.cat([embeddings, virtual]), torch.cat([labels, labels[first]])
    losses = []
    for query, row in enumerate(embeddings @ embeddings.T):
        positives = [z for z in range(len(labels)) if labels[z] == labels[query] and z != query]
        if not positives:
            continue
        counted = [
            [z for z in range(len(row)) if z != x and (z != query or definition == "released")] for x in positives
        ]
        ranks = torch.stack(
            [
                1 + torch.sigmoid((row[zs] - row[x]) / rank_temperature).sum()
                for x, zs in zip(positives, counted, strict=True)
            ]
        )
        for k in ks:
            k = min(k, batch)
            found = torch.sigmoid((k - ranks) / k_temperature).sum()
            is_cut = definition == "released"
            losses.append(1 - (found.clamp(max=k) / min(k, len(positives)) if is_cut else found / len(positives)))
    return torch.stack(losses).mean() if losses else embeddings.sum() * 0


def value_and_gradient(loss, embeddings, labels, **options):
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels, **options)
    value.backward()
    return value.detach(), leaf.grad


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches(), st.sampled_from([-1.0, 0.125, 1.0]), st.integers(1, 40))
def test_fused_loss_is_the_formula(batch, max_sparse_share, queries_per_block):
    embeddings, labels, options = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_plan, "_BLOCK_ENTRIES_CPU", 1)
        patch.setattr(query_plan, "_MIN_BLOCK_QUERIES", queries_per_block)
        patch.setattr(query_plan, "MAX_SPARSE_SHARE", max_sparse_share)
        patch.setattr(similarities, "MAX_SPARSE_SHARE", max_sparse_share)
        value, gradient = value_and_gradient(recall_at_k_surrogate, embeddings, labels, **options)
    expected_value, expected_gradient = value_and_gradient(slow_surrogate, embeddings, labels, **options)
    # Round-off of a similarity, 1e-16, over the smallest temperature, 1e-3, and over it again in the gradient.
    torch.testing.assert_close(value, expected_value, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batches(), st.integers(1, 4))
def test_shares_of_workers_sum_to_the_whole(batch, num_workers):
    embeddings, labels, options = batch
    value, gradient = value_and_gradient(recall_at_k_surrogate, embeddings, labels, **options)
    shares = [
        value_and_gradient(recall_at_k_surrogate, embeddings, labels, query_share=(worker, num_workers), **options)
        for worker in range(num_workers)
    ]
    torch.testing.assert_close(sum(value for value, _ in shares), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(gradient for _, gradient in shares), gradient, rtol=0, atol=1e-11)
