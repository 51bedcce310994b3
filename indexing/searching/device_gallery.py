"""Screening on a GPU: vectors lie there in float16, and products are summed in float32."""

import threading

import numpy as np
import torch
from jaxtyping import Float32, Float64
from numpy import ndarray

from indexing.searching.screening import NormBounds
from lookalike.exact_search import CandidatePool, float32_screening_error
from lookalike.products import as_tensor

# Fewer numbers than these a processor compares in the time that a GPU needs to answer at all.
_FEWEST_NUMBERS = 1 << 24
_MOST_OF_FREE_MEMORY = 0.5
_ROWS_OF_UPLOAD = 65_536
_ROWS_OF_BLOCK = 262_144
_ROWS_OF_FIRST_BLOCK = 4096
# Products stay far inside float16's range, and numbers far above its smallest.
_LARGEST_NORM = 1e3


class DeviceGallery:
    """All vectors of a store in a GPU's memory; one search at a time works on it."""

    def __init__(self, vectors: ndarray, *, device: str) -> None:
        """
        Args:
            vectors: [vectors, dim], float32 or float16, finite.
        """
        self._device = torch.device(device)
        self._rows = torch.empty(vectors.shape, dtype=torch.float16, device=self._device)
        self._lock = threading.Lock()
        lost = 0.0
        for start in range(0, len(vectors), _ROWS_OF_UPLOAD):
            block = as_tensor(vectors[start : start + _ROWS_OF_UPLOAD]).float()
            rounded = block.half()
            lost = max(lost, float((block - rounded.float()).square().sum(dim=1).max()))
            self._rows[start : start + len(block)].copy_(rounded)
        self._largest_lost = lost**0.5 * (1 + vectors.shape[1] * 2.0**-23)

    @classmethod
    def of(cls, vectors: ndarray, norms: NormBounds) -> "DeviceGallery | None":
        """On the current GPU; None where there is none, or it has no room, or the vectors are too few to pay."""
        if vectors.size < _FEWEST_NUMBERS or norms.largest > _LARGEST_NORM or not torch.cuda.is_available():
            return None
        free_bytes, _ = torch.cuda.mem_get_info()
        if 2 * vectors.size > _MOST_OF_FREE_MEMORY * free_bytes:
            return None
        return cls(vectors, device=f"cuda:{torch.cuda.current_device()}")

    def absolute_error(
        self, queries: Float32[ndarray, "queries dim"], norms: NormBounds
    ) -> Float64[ndarray, "queries"]:
        """How far a product may be from the true one: of rounding both to float16, and of the sum in float32."""
        rounded = queries.astype(np.float16).astype(np.float64)
        lost = np.linalg.norm(queries - rounded, axis=1)
        kept = np.linalg.norm(rounded, axis=1)
        summed = 2 * float32_screening_error(queries, largest_norm=norms.largest + self._largest_lost)
        error: ndarray = summed + lost * norms.largest + kept * self._largest_lost
        return error

    def screen(self, queries: Float32[ndarray, "queries dim"], pool: CandidatePool) -> None:
        """Gives `pool` what is not hopeless; only that leaves the GPU."""
        with self._lock, torch.inference_mode():
            halves = torch.from_numpy(queries.astype(np.float16)).to(self._device)
            start = 0
            while start < len(self._rows):
                stop = min(len(self._rows), start + (_ROWS_OF_BLOCK if start else _ROWS_OF_FIRST_BLOCK))
                scores = _product(halves, self._rows[start:stop])
                if start == 0:
                    pool.add(scores.cpu().numpy(), np.arange(stop))
                else:
                    cut = torch.from_numpy(pool.cut).to(self._device)
                    query_rows, columns = (scores >= cut[:, None]).nonzero(as_tuple=True)
                    kept = scores[query_rows, columns].cpu().numpy()
                    pool.add_some(query_rows.cpu().numpy(), start + columns.cpu().numpy(), kept)
                start = stop


def can_be_halved(queries: Float32[ndarray, "queries dim"]) -> bool:
    return bool((np.linalg.norm(queries.astype(np.float64), axis=1) <= _LARGEST_NORM).all())


def _product(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """In float32: a float16 result, or float16 partial sums, would have no bound worth having."""
    if queries.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.float().T
