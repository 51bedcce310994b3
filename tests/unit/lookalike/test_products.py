import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lookalike import products
from lookalike.native_libraries import set_thread_policy
from lookalike.products import product


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_of_mapped_and_transposed_arrays_is_numpys(dtype: type, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    # Small whole numbers, whose products are exact in every order.
    left, right = (generator.integers(-9, 9, (rows, 33)).astype(dtype) for rows in (1, 70))
    np.save(tmp_path / "right.npy", right)
    mapped = np.load(tmp_path / "right.npy", mmap_mode="r")
    for factors in ((left, mapped.T), (mapped, left.T), (mapped[::2], mapped.T), (left[:0], mapped.T)):
        found = product(*factors)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, factors[0] @ factors[1])


def test_a_process_without_torch_multiplies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "uses_torch", lambda: False)
    monkeypatch.setattr(products, "as_tensor", lambda block: pytest.fail("torch was asked"))
    np.testing.assert_array_equal(product(np.eye(3), np.full((3, 2), 7.0)), np.full((3, 2), 7.0))


def test_a_commands_numpy_has_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    set_thread_policy()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    program = (
        "import lookalike.console, sys; from lookalike.native_libraries import set_thread_policy; "
        "assert 'numpy' not in sys.modules, 'too late: numpy has its threads already'; set_thread_policy(); "
        "import numpy, threadpoolctl; print(max(pool['num_threads'] for pool in threadpoolctl.threadpool_info()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"
