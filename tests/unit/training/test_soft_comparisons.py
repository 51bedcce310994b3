"""Which comparisons a machine gets; what they compute is tested with the losses and with the kernels."""

import importlib.util
import logging
import shutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from training.losses import soft_comparisons
from training.losses.soft_comparisons import Comparisons, Sigmoid, TorchComparisons


class OnGpu(Tensor):
    """Says so."""

    is_cuda = True


class Kernels:
    def __init__(self, thresholds: Tensor, sigmoid: Sigmoid) -> None: ...

    def add_sums(self, *arguments: object) -> None: ...

    def add_pull(self, *arguments: object) -> None: ...


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installed, on a machine whose programs nobody has looked for yet."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    module = SimpleNamespace(TritonComparisons=Kernels)
    monkeypatch.setitem(sys.modules, "training.losses.triton_comparisons", module)
    monkeypatch.delenv("CC", raising=False)
    soft_comparisons._can_launch_kernels.cache_clear()
    yield
    soft_comparisons._can_launch_kernels.cache_clear()


def compare(*, on_gpu: bool = True) -> Comparisons:
    thresholds = torch.tensor([[0.5, 0.2]])
    return soft_comparisons.soft_comparisons(
        thresholds.as_subclass(OnGpu) if on_gpu else thresholds,
        Sigmoid(0.1, 20.0),
        is_served=torch.ones(1, 2, dtype=torch.bool),
    )


@pytest.mark.parametrize("compiler", ["gcc", "clang", "CC"])
def test_a_gpu_has_kernels_where_triton_finds_a_compiler(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    if compiler == "CC":
        monkeypatch.setenv("CC", "/opt/bin/cc")
    assert isinstance(compare(), Kernels)
    assert isinstance(compare(on_gpu=False), TorchComparisons)


def test_without_a_compiler_torch_compares_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(compare(on_gpu=False), TorchComparisons)
        assert not caplog.messages
        assert all(isinstance(compare(), TorchComparisons) for _ in range(3))
    (message,) = caplog.messages
    assert "no C compiler" in message


def test_without_triton_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert isinstance(compare(), TorchComparisons)
    assert not caplog.messages
