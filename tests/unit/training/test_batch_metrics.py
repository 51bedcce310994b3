import pytest
import torch
from torch import Tensor, nn

from training import batch_metrics
from training.batch_metrics import embedding_spread, neighbour_counts

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.repeat_interleave(torch.arange(8), torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]))[
    torch.randperm(36, generator=GENERATOR)
]
EMBEDDINGS = nn.functional.normalize(torch.randn(36, 5, generator=GENERATOR) + nn.functional.one_hot(LABELS)[:, :5])


def slow_counts(embeddings: Tensor, labels: Tensor, k: int) -> tuple[float, float, int]:
    hits, found, num_queries = 0.0, 0.0, 0
    for query in range(len(labels)):
        others = [index for index in range(len(labels)) if index != query]
        ranking = sorted(others, key=lambda index: -float(embeddings[query] @ embeddings[index]))
        relevant = [index for index in others if labels[index] == labels[query]]
        if relevant:
            first = [index for index in ranking[:k] if labels[index] == labels[query]]
            hits += bool(first)
            found += len(first) / len(relevant)
            num_queries += 1
    return hits, found, num_queries


@pytest.mark.parametrize("block_entries", [1, 100, 1 << 20])
def test_hit_rate_and_recall_are_those_of_a_full_sort(monkeypatch: pytest.MonkeyPatch, block_entries: int) -> None:
    monkeypatch.setattr(batch_metrics, "_BLOCK_ENTRIES", block_entries)
    counts = neighbour_counts(EMBEDDINGS, LABELS, ks=(1, 3, 16))
    for k in (1, 3, 16):
        hits, found, num_queries = slow_counts(EMBEDDINGS, LABELS, k)
        assert counts[f"hit_rate_at_{k}"] == (hits, num_queries)
        assert counts[f"recall_at_{k}"] == pytest.approx((found, num_queries), rel=1e-12)


def test_the_parts_of_processes_add_up() -> None:
    whole = neighbour_counts(EMBEDDINGS, LABELS)
    parts = [neighbour_counts(EMBEDDINGS, LABELS, share=(rank, 5)) for rank in range(5)]
    for name, (count, of) in whole.items():
        assert sum(part[name][0] for part in parts) == pytest.approx(count, rel=1e-12)
        assert sum(part[name][1] for part in parts) == of


def test_a_depth_beyond_the_batch_is_the_whole_batch() -> None:
    counts = neighbour_counts(EMBEDDINGS[:4], torch.tensor([0, 0, 1, 1]), ks=(1, 16))
    assert counts["recall_at_16"] == counts["hit_rate_at_16"] == (4.0, 4.0)


def test_spread_is_0_for_one_point_and_1_for_opposite_ones() -> None:
    point = nn.functional.normalize(torch.ones(1, 3))
    assert embedding_spread(point.expand(4, -1)) == pytest.approx(0, abs=1e-6)
    assert embedding_spread(torch.cat([point, -point])) == pytest.approx(1, abs=1e-6)
