"""The one place that decides the import order and the threads of torch and faiss.

Both bring their own OpenMP runtime. Loading faiss first, or letting both use every core at once, has crashed or
slowed many programs (faiss issues 2555, 3401, 4273; pytorch issue 149201). The order here is torch, then faiss.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

from lookalike.errors import ResourceError


def set_thread_policy() -> None:
    """Lets OpenMP threads sleep while they wait; called by every command before torch or faiss is loaded.

    By default they spin. With more runnable threads than cores (loader processes, a second program) a spinning thread
    keeps its core from the very thread it waits for: see docs/decisions/0002-waiting-threads-sleep.md. An
    OMP_WAIT_POLICY that is set already is respected.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def num_cores() -> int:
    """Cores this process may use: fewer than the machine has under an affinity mask or a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cpu_quota(Path("/sys/fs/cgroup/cpu.max"))))


def _cpu_quota(file: Path) -> int:
    """Whole cores of a cgroup's quota ("200000 100000": two); a very large number where there is none."""
    try:
        quota, period = file.read_text(encoding="utf-8").split()
        return sys.maxsize if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError):
        return sys.maxsize


def load_torch(*, num_threads: int | None = None) -> ModuleType:
    """Imports torch, sets its threads (all cores where None) and makes torchvision importable beside it."""
    if "faiss" in sys.modules and "torch" not in sys.modules:
        raise RuntimeError("faiss was imported before torch: import both through lookalike.native_libraries")
    import torch

    from lookalike.torchvision_import import make_torchvision_importable

    torch.set_num_threads(num_threads or num_cores())
    make_torchvision_importable()
    return torch


def load_faiss(*, beside_torch: bool = True, num_threads: int | None = None) -> ModuleType:
    """Imports faiss, after torch unless the process never uses torch (a worker that searches vectors only).

    Raises:
        ResourceError: no faiss is installed.
    """
    if beside_torch and "torch" not in sys.modules:
        load_torch()
    if importlib.util.find_spec("faiss") is None:
        raise ResourceError("faiss is not installed. Install lookalike with the extra [cpu] or [gpu].")
    # It reports at level INFO, through the root logger, which CPU builds of itself it cannot find.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    import faiss

    faiss.omp_set_num_threads(num_threads or num_cores())
    return faiss
