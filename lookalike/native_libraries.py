"""The one place that decides the import order and the threads of torch, faiss and numpy.

The first two bring their own OpenMP runtime. Loading faiss first, or letting both use every core at once, has crashed
or slowed many programs (faiss issues 2555, 3401, 4273; pytorch issue 149201). The order here is torch, then faiss.
"""

import ctypes
import importlib.util
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

from lookalike.errors import ResourceError

# Of `mallopt`, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_BYTES_KEPT = 1 << 30
# OpenMP keeps the number of threads for each thread that calls it.
_thread = threading.local()


class _Process:
    leaves_torch_out = False


_process = _Process()


def set_thread_policy() -> None:
    """Lets threads sleep while they wait; called by every command before numpy, torch or faiss is loaded.

    By default they spin. With more runnable threads than cores (loader processes, a second program) a spinning thread
    keeps its core from the very thread it waits for: see docs/decisions/0002-waiting-threads-sleep.md. The threads of
    numpy's OpenBLAS are none of OpenMP's and spin whatever is asked for, so it gets one; large products go to torch
    (`lookalike.products`). Variables that are set already are respected.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def keep_freed_memory() -> None:
    """Lets the process keep the memory of a network's layers for the next ones; called before an encoder is at work.

    glibc gives large blocks back to the system as soon as they are free, and gets them anew, page by page, for the next
    layer: see docs/decisions/0010-memory-of-layers-is-kept.md. From then on the process stays as large as it was at
    its largest. Does nothing where the C library is another.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _BYTES_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _BYTES_KEPT)
        # The areas of other threads end at 64 MB, and blocks that are larger would still come from the system.
        library.mallopt(_M_ARENA_MAX, 1)


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


def leave_torch_out() -> None:
    """Makes this process one that searches vectors only: faiss is loaded alone, and torch cannot be any more.

    Raises:
        RuntimeError: torch is loaded already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is loaded already, it is too late to leave it out")
    _process.leaves_torch_out = True


def uses_torch() -> bool:
    """Whether this process may load torch; see `leave_torch_out`."""
    return not _process.leaves_torch_out


def load_torch(*, num_threads: int | None = None) -> ModuleType:
    """Imports torch, sets its threads (all cores where None) and makes torchvision importable beside it."""
    if not uses_torch():
        raise RuntimeError("this process searches vectors only, and must not load torch")
    if "faiss" in sys.modules and "torch" not in sys.modules:
        raise RuntimeError("faiss was imported before torch: import both through lookalike.native_libraries")
    import torch

    from lookalike.torchvision_import import make_torchvision_importable

    torch.set_num_threads(num_threads or num_cores())
    make_torchvision_importable()
    return torch


def load_faiss(*, num_threads: int | None = None) -> ModuleType:
    """Imports faiss, after torch unless the process leaves torch out.

    Args:
        num_threads: Of what this thread of Python asks faiss to do; where None, as it was set before, or all cores.

    Raises:
        ResourceError: no faiss is installed.
    """
    if uses_torch() and "torch" not in sys.modules:
        load_torch()
    if importlib.util.find_spec("faiss") is None:
        raise ResourceError("faiss is not installed. Install lookalike with the extra [cpu] or [gpu].")
    # It reports at level INFO, through the root logger, which CPU builds of itself it cannot find.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    import faiss

    if num_threads or not hasattr(_thread, "has_set_faiss_threads"):
        faiss.omp_set_num_threads(num_threads or num_cores())
        _thread.has_set_faiss_threads = True
    return faiss
