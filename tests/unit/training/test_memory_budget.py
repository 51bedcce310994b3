"""Plans for chunks: rules against brute force, counted bytes against bytes added up by hand, one plan for all ranks."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.errors import ResourceError
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training.large_batch import backward_large_batch, freeze_batch_norm
from training.memory_budget import (
    ChunkCost,
    ChunkPlan,
    SavedBytes,
    available_ram_bytes,
    choose_chunks,
    free_memory_budget,
    measure_chunk,
    num_kept_chunks,
    plan_chunks,
)


class TwoLayers(nn.Module):
    """Saves exactly what `bytes_by_hand` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 32), nn.Linear(32, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(pixels.flatten(1) / 255)))

    @staticmethod
    def bytes_by_hand(num_pictures: int) -> int:
        inputs, hidden = 48, 32  # float32; relu's result is the second layer's input, saved twice, stored once
        return num_pictures * (inputs + hidden) * 4


def small_encoder() -> nn.Module:
    torch.manual_seed(0)
    encoder = create_encoder(EncoderSettings(backbone="test_resnet", drop_rate=0.3, projection_dim=8)).train()
    encoder.backbone.bn1.eval()
    return encoder


class Machine:
    """Made-up costs: a fixed price per chunk, a price per picture, and all chunk sizes asked for."""

    def __init__(self, *, seconds_per_chunk: float, bytes_per_picture: int = 100, fixed_bytes: int = 50) -> None:
        self.seconds_per_chunk, self.bytes_per_picture, self.fixed_bytes = (
            seconds_per_chunk,
            bytes_per_picture,
            fixed_bytes,
        )
        self.asked: list[int] = []

    def __call__(self, size: int) -> ChunkCost:
        self.asked.append(size)
        graph_bytes = self.bytes_per_picture * size
        return ChunkCost(graph_bytes, 2 * graph_bytes + self.fixed_bytes, self.seconds_per_chunk + 0.001 * size)


@pytest.mark.parametrize("num_pictures", [1, 5])
def test_saved_bytes_are_those_added_up_by_hand(num_pictures: int) -> None:
    encoder = TwoLayers()
    saved = SavedBytes(encoder)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        result = encoder(torch.zeros(num_pictures, 3, 4, 4, dtype=torch.uint8))
    assert saved.num_bytes == TwoLayers.bytes_by_hand(num_pictures)
    result.sum().backward()


def test_gradient_checkpointing_shows_in_the_bytes_of_a_picture() -> None:
    encoder = small_encoder()
    plain = measure_chunk(encoder, (3, 32, 32), 8)
    encoder.backbone.set_grad_checkpointing(True)
    assert measure_chunk(encoder, (3, 32, 32), 8).graph_bytes < 0.8 * plain.graph_bytes


def test_bfloat16_shows_in_the_bytes_of_a_picture() -> None:
    encoder = TwoLayers()
    narrow = measure_chunk(encoder, (3, 4, 4), 64, autocast=torch.bfloat16)
    # The hidden layer in two bytes instead of four, the pictures in both types or one.
    assert narrow.graph_bytes < TwoLayers.bytes_by_hand(64) + 64 * 48 * 2 + 8 * 48 * 32


def test_the_peak_is_at_least_what_a_process_must_hold() -> None:
    class Wasteful(TwoLayers):
        def forward(self, pixels: Tensor) -> Tensor:
            torch.ones(16 << 20).sum()  # 64 MiB for a moment, none of it saved
            return super().forward(pixels)

    cost = measure_chunk(Wasteful(), (3, 4, 4), 4)
    assert cost.graph_bytes == TwoLayers.bytes_by_hand(4)
    assert 60 << 20 < cost.peak_bytes < 100 << 20


def test_measuring_leaves_the_encoder_and_the_random_state_alone() -> None:
    encoder = small_encoder()
    kept_gradient = torch.ones(8)
    encoder.projection[1].bias.grad = kept_gradient
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    choose_chunks(encoder, (3, 32, 32), 8, budget_bytes=10**9, chunk_size=4)
    assert torch.equal(torch.rand(1), expected_draw)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert gradients.pop("projection.1.bias") is kept_gradient
    assert torch.equal(kept_gradient, torch.ones(8))
    assert set(gradients.values()) == {None}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("peak", [70, 100, 160])
@pytest.mark.parametrize("budget", [50, 160, 200, 260, 330, 400, 1000])
def test_kept_graphs_fit_at_every_moment_and_one_more_would_not(budget: int, peak: int, count: int) -> None:
    cost = ChunkCost(graph_bytes=70, peak_bytes=peak, seconds=1.0)

    def highest(num_kept: int) -> int:
        """Steps through the algorithm; a chunk at work takes its peak, whichever pass it is in."""
        moments, held = [0], 0
        for index in range(count):
            moments.append(held + cost.peak_bytes)
            held += cost.graph_bytes if index < num_kept else 0
        for index in range(count):
            held -= cost.graph_bytes if index < num_kept else 0
            moments.append(held + cost.peak_bytes)
        return max(moments)

    kept = num_kept_chunks(cost, count, budget_bytes=budget)
    assert 0 <= kept <= count
    assert kept == max([0, *(number for number in range(count + 1) if highest(number) <= budget)])


def test_the_chunk_is_the_smallest_that_is_nearly_as_fast_as_any() -> None:
    machine = Machine(seconds_per_chunk=0.002)
    plan = plan_chunks(machine, 4096, budget_bytes=10**9)
    rates = {size: size / machine(size).seconds for size in set(machine.asked)}
    fast = [size for size, rate in rates.items() if rate >= 0.95 * max(rates.values())]
    assert plan.chunk_size == min(fast) == 32
    assert max(machine.asked) < 4096, "sizes far beyond the knee need not be tried"


def test_a_size_that_would_not_fit_is_never_run() -> None:
    machine = Machine(seconds_per_chunk=10.0, fixed_bytes=0)  # the larger the better
    plan = plan_chunks(machine, 4096, budget_bytes=200 * 16 + 150)
    assert max(machine.asked) == 2, "each chunk takes longer than is worth waiting for"
    machine = Machine(seconds_per_chunk=1.0, fixed_bytes=0)
    plan = plan_chunks(machine, 4096, budget_bytes=200 * 16 + 150)
    assert max(machine.asked) == plan.chunk_size == 16
    assert plan.num_kept_chunks == 0


def test_chunks_are_of_nearly_equal_size() -> None:
    plan = plan_chunks(Machine(seconds_per_chunk=1.0), 100, budget_bytes=200 * 32 + 5000)
    assert plan.num_chunks == 4
    assert plan.chunk_size == 25


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_a_batch_below_the_knee_is_one_chunk_that_keeps_its_graph(batch_size: int) -> None:
    plan = plan_chunks(Machine(seconds_per_chunk=1.0), batch_size, budget_bytes=10**6)
    assert (plan.chunk_size, plan.num_chunks, plan.num_kept_chunks) == (batch_size, 1, 1)


def test_a_fixed_chunk_size_is_taken_and_only_the_kept_graphs_are_chosen() -> None:
    machine = Machine(seconds_per_chunk=0.1)
    plan = plan_chunks(machine, 100, budget_bytes=6 * 1000 + 2050, chunk_size=10)
    assert set(machine.asked) == {10}
    assert plan == ChunkPlan(10, 6, 10, 100, 2050, 8050, 10 / (0.1 + 0.001 * 10))


def test_a_plan_reads_as_the_settings_that_pin_it() -> None:
    plan = ChunkPlan(64, 3, 16, 1_500_000, 200_000_000, 600_000_000, 123.4)
    assert str(plan) == (
        "batch.chunk_size=64 batch.num_kept_chunks=3 (of 16): 1.50 MB per picture of a kept graph, 200 MB in flight, "
        "budget 600 MB, 123 images/s per pass"
    )


def test_a_budget_below_one_chunk_is_refused_with_both_figures() -> None:
    with pytest.raises(ResourceError, match=r"2 pictures take 20\.0 MB, the memory budget is 5\.0 MB.*memory_budget"):
        plan_chunks(Machine(seconds_per_chunk=1, bytes_per_picture=5 * 10**6), 64, budget_bytes=5 * 10**6)
    with pytest.raises(ResourceError, match="of 32 pictures take"):
        plan_chunks(Machine(seconds_per_chunk=1), 64, budget_bytes=300, chunk_size=32)


def test_a_pinned_plan_gives_the_gradient_of_the_whole_batch(caplog: pytest.LogCaptureFixture) -> None:
    encoder = create_encoder(EncoderSettings(backbone="test_resnet", projection_dim=8)).train()
    freeze_batch_norm(encoder)
    pixels = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, logger="training.memory_budget"):
        plan = choose_chunks(encoder, (3, 32, 32), 24, budget_bytes=10**9)
    assert str(plan) in caplog.text
    assert plan.num_kept_chunks == plan.num_chunks == -(-24 // plan.chunk_size)

    def square(rows: Tensor) -> tuple[Tensor, Tensor]:
        return (rows.sum(0) ** 2).sum() / 2, rows.sum(0).expand_as(rows)

    backward_large_batch(
        encoder, pixels, square, chunk_size=plan.chunk_size, num_kept_chunks=plan.num_kept_chunks, seed=0
    )
    found = [parameter.grad for parameter in encoder.parameters()]
    encoder.zero_grad()
    ((encoder(pixels).sum(0) ** 2).sum() / 2).backward()
    for parameter, gradient in zip(encoder.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)  # float32


def plan_of_rank(world: World, budgets: list[int]) -> ChunkPlan | str:
    encoder = TwoLayers()
    try:
        return choose_chunks(encoder, (3, 4, 4), 64, budget_bytes=budgets[world.rank], chunk_size=8, world=world)
    except ResourceError as error:
        return str(error)


def test_all_ranks_get_the_plan_of_the_least_budget() -> None:
    plans = run_on_ranks(plan_of_rank, 3, [10**9, 900_000_001, 2 * 10**9])
    assert plans[0] == plans[1] == plans[2]
    assert isinstance(plans[0], ChunkPlan)
    assert plans[0].budget_bytes == 900_000_001
    assert plans[0].bytes_per_picture == TwoLayers.bytes_by_hand(1)


def test_all_ranks_fail_where_one_has_no_room() -> None:
    first, second = run_on_ranks(plan_of_rank, 2, [10**9, 100])
    assert "8 pictures take" in first
    assert "see the error of rank 0" in second


def test_the_default_budget_is_a_share_of_what_is_free_less_what_the_optimizer_needs() -> None:
    encoder = TwoLayers()
    encoder.second.requires_grad_(False)
    available = available_ram_bytes()
    num_bytes = 3 * 4 * (48 * 32 + 32)  # gradient and two moments of the first layer
    whole, half = (free_memory_budget(encoder, share=0.5, num_processes_on_device=count) for count in (1, 2))
    # Others use the machine at the same time.
    assert whole == pytest.approx(0.5 * available - num_bytes, rel=0.2)
    assert half == pytest.approx(0.25 * available - num_bytes, rel=0.2)


def test_a_container_limits_what_is_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:   4000 kB\n")
    assert available_ram_bytes(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_ram_bytes(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    assert available_ram_bytes(meminfo, tmp_path) == 2_000_000


def test_an_unknown_system_is_told_to_set_the_budget(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"Set batch\.memory_budget"):
        available_ram_bytes(tmp_path / "none", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\n")
    with pytest.raises(ResourceError, match="has no MemAvailable"):
        available_ram_bytes(tmp_path / "meminfo", tmp_path)


def test_where_the_system_does_not_tell_the_peak_it_is_twice_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.memory_budget._PROCESS", tmp_path / "none")
    cost = measure_chunk(TwoLayers(), (3, 4, 4), 4)
    assert cost.peak_bytes == 2 * cost.graph_bytes == 2 * TwoLayers.bytes_by_hand(4)
