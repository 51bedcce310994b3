"""Scores of any number of vectors, block by block, and the counts over distractors: resumable, on any number of ranks.

A score never depends on where its vector is stored: files are read as one long list of rows, and every product has
one shape, padded with zeros where the list ends. So the division into files, the ranks, the points of a curve and a
restart change no bit of a result.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray

from evaluation.revisited.rank_counts import RankCounts
from lookalike.artifacts import write_atomically
from lookalike.collectives import any_rank, sum_over_ranks
from lookalike.errors import DataError
from lookalike.products import product
from lookalike.progress import Progress
from lookalike.world import World

logger = logging.getLogger(__name__)

# In float32 a block of 2048 dimensions takes 32 MiB.
_BLOCK_ROWS = 4096
_BLOCKS_PER_SAVE = 32
_CONVERTED_ROWS = 256  # at a time: about what stays in a core's cache


class VectorList:
    """Arrays of vectors as one list of rows. They may be memory-mapped and of any float type."""

    def __init__(self, arrays: Sequence[ndarray]) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def file_states(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change of the files behind memory-mapped arrays."""
        files = [Path(array.filename) for array in self._arrays if isinstance(array, np.memmap) and array.filename]
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read_into(self, block: Float32[ndarray, "rows dim"], start: int) -> int:
        """Fills `block` with the rows from `start` on and zeros behind the last; returns how many there are."""
        end = min(start + len(block), len(self))
        for array, first in zip(self._arrays, self._starts[:-1], strict=True):
            own = slice(max(start - first, 0), max(end - first, 0))
            rows = array[own]
            place = max(first - start, 0)
            if len(rows):
                _convert(rows, block[place : place + len(rows)])
        block[end - start :] = 0
        return end - start


def score_blocks(
    queries: Float32[ndarray, "queries dim"], vectors: VectorList, numbers: Sequence[int]
) -> Iterator[tuple[int, Float32[ndarray, "queries block"]]]:
    """First row and inner products of each of the blocks of these numbers.

    Values that are not finite give scores that are not; no warning.
    """
    # One block for all: fresh memory costs as much as a product.
    block = np.zeros((_BLOCK_ROWS, queries.shape[1]), np.float32)
    for number in numbers:
        start = number * _BLOCK_ROWS
        with np.errstate(all="ignore"):
            length = vectors.read_into(block, start)
            scores = np.ascontiguousarray(product(queries, block.T)[:, :length])
        yield start, scores


def num_blocks(vectors: VectorList) -> int:
    return -(-len(vectors) // _BLOCK_ROWS)


def count_distractors(
    counts: RankCounts,
    queries: Float32[ndarray, "queries dim"],
    distractors: VectorList,
    *,
    points: Sequence[int],
    world: World,
    progress_file: Path | None,
) -> None:
    """Adds all distractors to `counts`, each rank its share; afterwards every rank has the counts of all.

    Args:
        points: Ascending from 0 to the number of distractors; those from one point to the next are one part.
        progress_file: This rank's counts are kept there now and then, and a rerun continues from them. Rank 0 takes
            the name itself, another rank adds its number.

    Raises:
        DataError: distractors are not finite, or the file is of another evaluation; on every rank, if on one.
    """
    own_file = progress_file and progress_file.with_name(progress_file.name + (f".{world.rank}" if world.rank else ""))
    failure: DataError | None = None
    try:
        _count_share(counts, queries, distractors, points, world, own_file)
    except DataError as error:
        failure = error
    # NCCL, which ranks with GPUs speak, carries only what is in a GPU's memory.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if any_rank(failure is not None, world, device=device):
        raise failure or DataError("another rank could not count its share of the distractors; its message says why.")
    if world.size > 1:
        summed = {name: torch.from_numpy(array).to(device) for name, array in counts.state().items()}
        sum_over_ranks(summed.values(), world)
        counts.load_state({name: tensor.cpu().numpy() for name, tensor in summed.items()})
    if own_file:
        own_file.unlink(missing_ok=True)


def _count_share(
    counts: RankCounts,
    queries: Float32[ndarray, "queries dim"],
    distractors: VectorList,
    points: Sequence[int],
    world: World,
    progress_file: Path | None,
) -> None:
    numbers = range(num_blocks(distractors))[world.rank :: world.size]
    identity = _identity(counts, queries, distractors, numbers, points, world) if progress_file else ""
    done = _load_progress(counts, progress_file, identity)
    own_total = sum(min(_BLOCK_ROWS, len(distractors) - number * _BLOCK_ROWS) for number in numbers)
    with Progress(
        own_total, description="distractors", unit="vectors", done=counts.num_distractors, is_shown=world.is_first
    ) as progress:
        for num_done, (start, scores) in enumerate(score_blocks(queries, distractors, numbers[done:]), start=done + 1):
            end = start + scores.shape[1]
            try:
                for part, (first, last) in enumerate(pairwise(points)):
                    counts.add_distractors(scores[:, max(first - start, 0) : max(last - start, 0)], part=part)
            except ValueError as error:
                if progress_file:
                    progress_file.unlink(missing_ok=True)  # whoever mends the vectors counts all of them again
                raise DataError(f"distractors {start} to {end}: {error}.") from error
            progress.advance(end - start)
            if progress_file and num_done % _BLOCKS_PER_SAVE == 0:
                _save_progress(counts, progress_file, identity, num_done)


def _save_progress(counts: RankCounts, file: Path, identity: str, num_done: int) -> None:
    buffer = io.BytesIO()
    stored: dict[str, Any] = {"identity": identity, "num_done": num_done, **counts.state()}
    np.savez(buffer, **stored)
    write_atomically(file, buffer.getvalue())


def _load_progress(counts: RankCounts, file: Path | None, identity: str) -> int:
    if file is None or not file.exists():
        return 0
    try:
        with np.load(file, allow_pickle=False) as stored:
            state = dict(stored)
        is_own, num_done = str(state["identity"]) == identity, int(state["num_done"])
    except Exception as error:
        # numpy raises anything from EOFError to zipfile.BadZipFile on files of another kind.
        raise DataError(f"{file} cannot be read as the counts of an evaluation: {error!r}. Remove it.") from error
    if not is_own:
        raise DataError(
            f"{file} holds the counts of another evaluation, or of another number of processes. Remove it, or name "
            "another file."
        )
    counts.load_state(state)
    logger.info("continuing after %d blocks of distractors", num_done)
    return num_done


def _identity(
    counts: RankCounts,
    queries: Float32[ndarray, "queries dim"],
    distractors: VectorList,
    numbers: Sequence[int],
    points: Sequence[int],
    world: World,
) -> str:
    """Of queries, thresholds, parts and this rank's blocks: files by size and time, one vector of each block."""
    digest = hashlib.sha256(queries.tobytes())
    for query in counts.queries:
        digest.update(query.scores.tobytes())
    digest.update(f"{world.rank} {world.size} {_BLOCK_ROWS} {len(distractors)} {list(points)}".encode())
    digest.update(repr(distractors.file_states()).encode())
    sample = np.zeros((1, queries.shape[1]), np.float32)
    for number in numbers:
        distractors.read_into(sample, number * _BLOCK_ROWS)
        digest.update(sample.tobytes())
    return digest.hexdigest()


def _convert(rows: ndarray, target: Float32[ndarray, "rows dim"]) -> None:
    """torch converts float16 five times as fast as numpy 2.4."""
    if rows.dtype != np.float16:
        target[...] = rows
        return
    for start in range(0, len(rows), _CONVERTED_ROWS):
        part = slice(start, start + _CONVERTED_ROWS)
        torch.from_numpy(target[part]).copy_(torch.from_numpy(np.array(rows[part])))  # a map's rows are read-only
