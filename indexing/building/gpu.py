"""FAISS on GPUs, where the installed faiss can use them and there are any; else the CPU, without a word."""

from typing import Any

from lookalike.native_libraries import load_faiss


def num_gpus() -> int:
    """GPUs that faiss can use; 0 for a CPU build of faiss."""
    faiss = load_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def create_assigner(dim: int, *, device: int = 0) -> Any:
    """An empty index of inner products that finds each vector's centroid: on GPU `device` modulo their number.

    Results may differ between CPU and GPU where two centroids are equally near within float32 rounding.
    Not thread-safe on a GPU, not even for reading: one process per GPU uses it.
    """
    faiss = load_faiss()
    available = num_gpus()
    if not available:
        return faiss.IndexFlatIP(dim)
    config = faiss.GpuIndexFlatConfig()
    config.device = device % available
    return faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), dim, config)
