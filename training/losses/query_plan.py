"""Which similarities a loss of ranks needs: queries and gallery in blocks, tiles of both, and pairs that matter.

Tiles are square, so that one above the diagonal can serve the queries of its rows and those of its columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from training.losses.class_rows import ClassRows
from training.losses.similarities import Block, Similarities
from training.losses.soft_comparisons import Sigmoid

# Similarities of a tile. 1 MB of float32 stays in a core's cache; an accelerator wants more work per launch.
_BLOCK_ENTRIES_CPU = 1 << 18
_BLOCK_ENTRIES_ACCELERATOR = 1 << 24
_MIN_BLOCK_QUERIES = 32
# The share of pairs up to which they are listed; where lists and tiles meet matters little.
MAX_SPARSE_SHARE = 1 / 64
# Bounds the list of near pairs, 40 bytes each, to about the memory of the embeddings.
_MAX_NEAR_PER_SAMPLE = 64

OfBlocks = list[Float[Tensor, "_ _"]]  # of one block of queries after another, each [queries, positives] of its own


@dataclass(frozen=True, slots=True)
class Queries:
    """Some queries and their positives. Queries with more positives come first."""

    block: Block
    positives: Int[Tensor, "queries positives"]  # in the gallery
    is_positive: Bool[Tensor, "queries positives"]
    thresholds: Float[Tensor, "queries positives"]  # similarities of the positives; some of them again as padding

    def __len__(self) -> int:
        return len(self.positives)


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Pairs of some queries with images near one of their thresholds or above."""

    rows: Int[Tensor, "pairs"]  # of the block of queries
    samples: Int[Tensor, "pairs"]
    similarities: Float[Tensor, "pairs"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which tiles to work on: each block of queries against each block of the gallery."""

    queries: list[Queries]
    gallery: list[Block]  # all samples
    is_symmetric: bool  # the gallery begins with the blocks of the queries: a tile above the diagonal serves both
    place: Int[Tensor, "samples 2"]  # of each sample: its block of the gallery, and where in it
    ranks_query_itself: bool

    def tiles(self, samples: Similarities) -> Iterator[tuple[int, int, bool, Float[Tensor, "queries gallery"]]]:
        """(block of queries, block of the gallery, whether that is one of queries to serve too, similarities)."""
        for row, queries in enumerate(self.queries):
            for column in range(row if self.is_symmetric else 0, len(self.gallery)):
                similarities = samples.between(queries.block, self.gallery[column])
                if not self.ranks_query_itself and (row == column or not self.is_symmetric):
                    block, place = self.place[queries.block.samples].unbind(1)
                    rows = (block == column).nonzero().squeeze(1)
                    similarities[rows, place[rows]] = -math.inf
                serves_both = self.is_symmetric and row < column < len(self.queries)
                yield row, column, serves_both, similarities


def plan_tiles(
    samples: Similarities, classes: ClassRows, share: Int[Tensor, "queries"], *, ranks_query_itself: bool
) -> Plan:
    size = _block_size(share.device)
    queries = [_queries(samples, classes, block) for block in share.split(size)] if len(share) else []
    is_query = torch.zeros_like(classes.order, dtype=torch.bool)
    is_query[share] = True
    others = (~is_query).nonzero().squeeze(1)
    gallery = [part.block for part in queries]
    gallery += [samples.block(block) for block in others.split(size)] if len(others) else []
    return Plan(
        queries,
        gallery,
        is_symmetric=True,
        place=_places(gallery, len(classes.order)),
        ranks_query_itself=ranks_query_itself,
    )


def _places(gallery: list[Block], num_samples: int) -> Int[Tensor, "samples 2"]:
    device = gallery[0].samples.device
    place = torch.empty(num_samples, 2, dtype=torch.int64, device=device)
    for index, block in enumerate(gallery):
        place[block.samples, 0] = index
        place[block.samples, 1] = torch.arange(len(block.samples), device=device)
    return place


def _block_size(device: torch.device) -> int:
    entries = _BLOCK_ENTRIES_CPU if device.type == "cpu" else _BLOCK_ENTRIES_ACCELERATOR
    return max(_MIN_BLOCK_QUERIES, math.isqrt(entries))


def _queries(samples: Similarities, classes: ClassRows, queries: Int[Tensor, "queries"]) -> Queries:
    positives, is_positive = classes.others(queries)
    # A few queries at a time: together they have few positives, so few similarities that are none of a positive.
    size = max(_MIN_BLOCK_QUERIES, len(queries) // 4)
    thresholds = []
    for few, their_positives in zip(queries.split(size), positives.split(size), strict=True):
        columns, column_of = their_positives.unique(return_inverse=True)
        thresholds.append(samples.between(samples.block(few), samples.block(columns)).gather(1, column_of))
    every = torch.cat(thresholds)
    return Queries(samples.block(queries), positives, is_positive, torch.where(is_positive, every, every[:, :1]))


def floor_of(
    queries: Queries, is_served: Bool[Tensor, "queries positives"], sigmoid: Sigmoid
) -> Float[Tensor, "queries"]:
    """The similarity of each query below which an image is far."""
    lowest = torch.where(is_served, queries.thresholds, math.inf).amin(1)
    return lowest - sigmoid.saturation * sigmoid.temperature


def near_pairs(samples: Similarities, plan: Plan, floors: list[Float[Tensor, "_"]]) -> list[NearPairs] | None:
    """Of each block of queries; None where they are too many to list."""
    starts = torch.tensor([0, *map(len, plan.queries)]).cumsum(0).tolist()
    num_samples = len(plan.place)
    most = min(MAX_SPARSE_SHARE * starts[-1] * num_samples, _MAX_NEAR_PER_SAMPLE * num_samples)
    found = _PairList(floors, capacity=num_samples * _MAX_NEAR_PER_SAMPLE // 2)
    num_found = 0
    for row, column, serves_both, similarities in plan.tiles(samples):
        floor = floors[row][:, None]
        if serves_both:
            floor = torch.minimum(floor, floors[column])
        rows, columns = (similarities > floor).nonzero(as_tuple=True)
        num_found += len(rows)
        if num_found > most:
            return None
        values = similarities[rows, columns]
        of_row = values > floors[row][rows]
        found.add(starts[row] + rows[of_row], plan.gallery[column].samples[columns[of_row]], values[of_row])
        if serves_both:
            of_column = values > floors[column][columns]
            images = plan.gallery[row].samples[rows[of_column]]
            found.add(starts[column] + columns[of_column], images, values[of_column])
    return found.of_blocks(starts)


class _PairList:
    """Grows in few large pieces of memory: many small ones would keep what lies between them from being given back."""

    def __init__(self, floors: list[Float[Tensor, "_"]], *, capacity: int) -> None:
        like = floors[0] if floors else torch.empty(0)
        self._rows = torch.empty(capacity, dtype=torch.int64, device=like.device)
        self._samples = torch.empty_like(self._rows)
        self._similarities = torch.empty_like(self._rows, dtype=like.dtype)
        self._count = 0

    def add(self, rows: Int[Tensor, "new"], samples: Int[Tensor, "new"], similarities: Float[Tensor, "new"]) -> None:
        end = self._count + len(rows)
        if end > len(self._rows):
            size = 2 * end
            for name in ("_rows", "_samples", "_similarities"):
                old = getattr(self, name)
                new = old.new_empty(size)
                new[: self._count] = old[: self._count]
                setattr(self, name, new)
        self._rows[self._count : end] = rows
        self._samples[self._count : end] = samples
        self._similarities[self._count : end] = similarities
        self._count = end

    def of_blocks(self, starts: list[int]) -> list[NearPairs]:
        """Those of each block, rows counted from its start; `starts` are those of the blocks, and the end."""
        rows, by_row = torch.sort(self._rows[: self._count], stable=True)
        samples, similarities = self._samples[by_row], self._similarities[by_row]
        bounds = torch.searchsorted(rows, torch.tensor(starts, device=rows.device)).tolist()
        return [
            NearPairs(rows[begin:end] - start, samples[begin:end], similarities[begin:end])
            for start, begin, end in zip(starts[:-1], bounds[:-1], bounds[1:], strict=True)
        ]


def of_live_queries(samples: Similarities, plan: Plan, slopes: OfBlocks) -> tuple[Plan, OfBlocks]:
    """Without the queries that have no slope, where those are many, and with what has slopes first."""
    num_live = sum(int(part.any(1).count_nonzero()) for part in slopes)
    keeps_all = 2 * num_live > sum(map(len, plan.queries))
    queries, kept_slopes = [], []
    for one, part in zip(plan.queries, slopes, strict=True):
        by_slope = torch.argsort((part == 0).to(torch.uint8), dim=1, stable=True)
        num_slopes = part.count_nonzero(dim=1)
        rows = torch.argsort(num_slopes, descending=True, stable=True)
        rows = rows if keeps_all else rows[: int(num_slopes.count_nonzero())]
        by_slope = by_slope[rows]
        queries.append(
            Queries(
                samples.block(one.block.samples[rows]),
                *(values[rows].gather(1, by_slope) for values in (one.positives, one.is_positive, one.thresholds)),
            )
        )
        kept_slopes.append(part[rows].gather(1, by_slope))
    if keeps_all:
        gallery = [one.block for one in queries] + plan.gallery[len(queries) :]
        return replace(plan, queries=queries, gallery=gallery, place=_places(gallery, len(plan.place))), kept_slopes
    joined = _joined(samples, queries, kept_slopes)
    return replace(plan, queries=[one for one, _ in joined], is_symmetric=False), [part for _, part in joined]


def _joined(
    samples: Similarities, queries: list[Queries], slopes: OfBlocks
) -> list[tuple[Queries, Float[Tensor, "queries positives"]]]:
    """The same queries in fewer blocks, as wide as the widest of their parts."""
    joined: list[tuple[Queries, Tensor]] = []
    begun: list[tuple[Queries, Tensor]] = []
    size = _block_size(queries[0].positives.device)
    for index, one in enumerate(zip(queries, slopes, strict=True)):
        begun.append(one)
        if sum(len(part) for part, _ in begun) >= size or index == len(queries) - 1:
            wide = max(part.positives.shape[1] for part, _ in begun)
            tables = [
                [functional.pad(table, (0, wide - table.shape[1])) for table in tables]
                for tables in zip(
                    *((part.positives, part.is_positive, part.thresholds, slope) for part, slope in begun), strict=True
                )
            ]
            positives, is_positive, thresholds, slope = map(torch.cat, tables)
            block = samples.block(torch.cat([part.block.samples for part, _ in begun]))
            joined.append((Queries(block, positives, is_positive, thresholds), slope))
            begun = []
    return [one for one in joined if len(one[0])]


def queries_of_share(classes: ClassRows, query_share: tuple[int, int]) -> tuple[int, Int[Tensor, "queries"]]:
    """How many queries have positives, and those of one worker, those with more positives first."""
    worker, num_workers = query_share
    ranked = classes.order[classes.sizes[classes.order] > 1]
    # By class, because mixed queries of one class are made of the same images.
    share = ranked[len(ranked) * worker // num_workers : len(ranked) * (worker + 1) // num_workers]
    return len(ranked), share[torch.argsort(classes.sizes[share], descending=True, stable=True)]
