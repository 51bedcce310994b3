"""The kernels of a GPU, run by Triton's interpreter on the CPU; torch's operations are the oracle."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.losses import query_plan, smooth_ranks
from training.losses.mixing import PairMixing, draw_mixing
from training.losses.recall_at_k import recall_at_k_with_gradient
from training.losses.smooth_ap import smooth_average_precision_with_gradient
from training.losses.soft_comparisons import Sigmoid, TorchComparisons, Workspace, saturation_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    # A GPU does not speak of it, and the kernels count on what it gives.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the kernels, made for the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name = "training.losses.triton_comparisons"
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


# A row and a column more than a program has, one positive, more than a program has.
@pytest.mark.parametrize(("num_rows", "num_columns", "num_positives"), [(9, 33, 3), (8, 65, 1), (33, 7, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_tile_is_summed_as_by_torch(
    kernels: ModuleType, num_rows: int, num_columns: int, num_positives: int, dtype: torch.dtype, is_turned: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, dtype=dtype, generator=generator) - 1

    similarities = draw(num_columns, num_rows).T if is_turned else draw(num_rows, num_columns)
    similarities[0, 0] = -torch.inf  # the query itself
    thresholds, slopes = draw(num_rows, num_positives), draw(num_rows, num_positives)
    sums, pulls, pull = draw(num_rows, num_positives), draw(num_rows, num_positives), draw(*similarities.shape)
    sigmoid = Sigmoid(0.02, saturation_of(dtype, num_columns))
    expected_sums, expected_pulls, expected_pull = sums.clone(), pulls.clone(), pull.clone()
    oracle = TorchComparisons(thresholds, sigmoid, is_served=torch.ones_like(thresholds, dtype=torch.bool))
    workspace = Workspace(2).like(similarities)
    oracle.add_sums(expected_sums, similarities, workspace)
    oracle.add_pull(expected_pull, expected_pulls, slopes, similarities, workspace)

    comparisons = kernels.TritonComparisons(thresholds, sigmoid)
    comparisons.add_sums(sums, similarities, [])
    comparisons.add_pull(pull, pulls, slopes, similarities, [])
    for found, expected in ((sums, expected_sums), (pulls, expected_pulls), (pull, expected_pull)):
        # Similarities of 1 over a temperature of .02: an exponent of 50 is off by as many units of round-off.
        torch.testing.assert_close(found, expected, rtol=0, atol=200 * num_columns * torch.finfo(dtype).eps)


@pytest.mark.parametrize("loss", ["recall at k", "recall at k with mixing", "smooth AP"])
def test_a_loss_and_its_gradient_are_those_of_torch(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Ragged classes, tiles that serve both their queries, ranks and gradient from tiles."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.repeat_interleave(torch.arange(9), torch.tensor([2, 5, 1, 3, 4, 2, 6, 3, 4]))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(9, 8, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(labels), 8, dtype=torch.float64, generator=generator)
    embeddings = functional.normalize(centres[labels] + noise, dim=1)
    # Nothing is listed, and a tile is a small square.
    monkeypatch.setattr(query_plan, "MAX_SPARSE_SHARE", 0.0)
    monkeypatch.setattr(query_plan, "_block_size", lambda device: 16)

    def compute() -> tuple[Tensor, Tensor]:
        if loss == "smooth AP":
            result = smooth_average_precision_with_gradient(embeddings, labels, rank_temperature=0.1)
        else:
            mixing = None
            if loss == "recall at k with mixing":
                mixing = draw_mixing(labels, seed=0, step=0)
            result = recall_at_k_with_gradient(embeddings, labels, ks=(1, 4), rank_temperature=0.1, mixing=mixing)
        assert result.gradient is not None
        return result.loss, result.gradient

    expected_loss, expected_gradient = compute()
    calls = []

    def by_kernel(thresholds: Tensor, sigmoid: Sigmoid, *, is_served: Tensor) -> object:
        calls.append(len(thresholds))
        return kernels.TritonComparisons(thresholds, sigmoid)

    monkeypatch.setattr(smooth_ranks, "soft_comparisons", by_kernel)
    found_loss, found_gradient = compute()
    assert len(calls) >= 4, "the tiles of ranks and of the gradient, two blocks each"
    torch.testing.assert_close(found_loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-10, atol=1e-12)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from training.losses import triton_comparisons as module

sizes = {"ROWS": 8, "COLUMNS": 32}
pointers = ("similarities", "thresholds", "slopes", "sums", "pull", "scale_place")
for kernel, constants in (
    (module._add_pull_kernel, sizes),
    (module._add_row_sums_kernel, {**sizes, "POSITIVES": 4, "OF_STEEPNESS": True}),
):
    for architecture, dtype in ((80, "fp32"), (90, "fp32"), (90, "fp64")):
        signature = {
            name: "constexpr" if name in constants else f"*{dtype}" if name in pointers else "i32"
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        assert "cubin" in compile(source, target=GPUTarget("cuda", architecture, 32)).asm
"""


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler does. That needs no GPU, but a process without an interpreter."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_a_gpu_gives_the_loss_and_gradient_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(4096) // 4
    embeddings = functional.normalize(
        torch.randn(1024, 64, generator=generator)[labels] + torch.randn(4096, 64, generator=generator), dim=1
    )
    for mixing in (None, draw_mixing(labels, seed=0, step=0)):
        expected = recall_at_k_with_gradient(embeddings.double(), labels, mixing=mixing)
        if mixing is not None:
            mixing = PairMixing(mixing.pairs.cuda(), mixing.coefficients.cuda())
        found = recall_at_k_with_gradient(embeddings.cuda(), labels.cuda(), mixing=mixing)
        assert expected.gradient is not None
        assert found.gradient is not None
        torch.testing.assert_close(found.loss.cpu().double(), expected.loss, rtol=1e-4, atol=0)
        difference = (found.gradient.cpu().double() - expected.gradient).norm()
        assert float(difference) < 1e-3 * float(expected.gradient.norm())
