"""How well a finished index finds the exact nearest, at which effort.

Queries are vectors of the collection that training did not see; they must find their neighbours, not themselves. Each
point of the curve is the cheapest effort that reaches its level. No clock has a part in it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from indexing.index_types import Codec
from indexing.planning.calibration import nominal_rates
from indexing.planning.cost_model import SearchWork, query_seconds
from indexing.planning.held_out import held_out_of_graph, held_out_rows
from indexing.searching.faiss_searcher import EXTRA_CANDIDATES, FaissSearcher
from indexing.searching.recall_curve import RecallCurve, RecallPoint
from indexing.settings import IndexSettings
from indexing.vector_store import VectorStore
from lookalike.exact_search import exact_scores
from lookalike.id_selection import IdSelection
from lookalike.native_libraries import load_faiss
from lookalike.progress import track
from lookalike.records import Effort, SearchParameters

LEVELS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
MOST_CANDIDATES_PER_HIT = 16
# Finer codes miss nearly nothing: the 16 candidates that every search adds are enough.
_MOST_CANDIDATES_PER_HIT_OF: dict[Codec, int] = {
    "Flat": 1,
    "SQfp16": 1,
    "SQ8": 2,
    "RaBitQ": MOST_CANDIDATES_PER_HIT,
}
# Levels above the one asked for are measured up to this share of what exact search costs, which always finds all.
_WORTH_OF_EXACT_SEARCH = 0.25
# The cheapest of many efforts that reach a level is the one that chance has favoured: so much above it is looked for,
# at most a tenth of what may be missed.
_MARGIN = 0.001
# Multiples of the fewest partitions that hold enough neighbours; more of them may need fewer candidates.
_PROBE_FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0)
_WIDEST_BREADTH = 8192
_RESOLUTION_OF_BREADTH = 32  # bisection stops at this fraction of it
_LARGEST_STANDARD_ERROR = 0.0015
_LARGEST_TRUTH_OPERATIONS = 2 * 10**12  # of exact search for more queries than asked for
_BYTES_OF_GATHERED_ROWS = 16 << 20
_TIMED_QUERIES, _TIMED_SECONDS = 64, 1.0


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredQueries:
    """Vectors of a collection and the exact nearest of each, itself excluded."""

    vectors: Float32[ndarray, "queries dim"]
    own_ids: Int64[ndarray, "queries"]
    wanted: Int64[ndarray, "queries at"]
    lowest_scores: Float32[ndarray, "queries"]  # of the last one wanted: equal scores are as good

    @classmethod
    def draw(cls, searcher: FaissSearcher, store: VectorStore, *, count: int, at: int, seed: int) -> "MeasuredQueries":
        """The first `count` of those held out of training; none of them is to be found where the index lacks them."""
        held_out = _held_out(searcher, store, seed=seed)
        rows = np.sort(held_out[:count])
        vectors, own_ids = np.asarray(store.vectors[rows], np.float32), np.asarray(store.ids[rows])
        is_lacking = searcher.index is not None and searcher.index.ntotal < store.num_vectors
        lacking = IdSelection.all_but(store.ids[held_out]) if is_lacking else None
        nearest = searcher.exact.search(vectors, SearchParameters(k=at + 1, among=lacking))
        others = others_than(own_ids, nearest.ids)
        return cls(vectors, own_ids, nearest.ids[others].reshape(-1, at), nearest.scores[others].reshape(-1, at)[:, -1])

    @property
    def at(self) -> int:
        return int(self.wanted.shape[1])

    def candidates(self, searcher: FaissSearcher, effort: Effort) -> Int64[ndarray, "queries depth"]:
        """What FAISS finds for a search of `at`, best first, the query itself left out; ends in -1 where too few."""
        faiss = load_faiss()
        depth = candidate_depth(self.at, effort)
        if searcher.index_type.family == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=effort.num_probes)
        else:
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort.breadth or 1, depth))
        assert searcher.index is not None
        _, found = searcher.index.search(self.vectors, depth + 1, params=parameters)
        return found[others_than(self.own_ids, found)].reshape(len(found), depth)

    def recalls(self, searcher: FaissSearcher, effort: Effort) -> Float64[ndarray, "queries"]:
        """The share that each query finds once its candidates are scored exactly."""
        found = self.candidates(searcher, effort)
        is_hit = np.zeros(found.shape, bool)
        query_rows, places = np.nonzero(found >= 0)
        step = max(1, _BYTES_OF_GATHERED_ROWS // (4 * searcher.dim))
        for start in range(0, len(query_rows), step):
            part = query_rows[start : start + step], places[start : start + step]
            scores = exact_scores(self.vectors[part[0]], searcher.vectors_of(found[part]))
            is_hit[part] = scores >= self.lowest_scores[part[0]]
        return np.minimum(is_hit.sum(axis=1), self.at) / self.at


def _held_out(searcher: FaissSearcher, store: VectorStore, *, seed: int) -> Int64[ndarray, "held_out"]:
    draw = held_out_of_graph if searcher.index_type.family == "hnsw" else held_out_rows
    return draw(store.num_vectors, seed=seed)


def others_than(own_ids: Int64[ndarray, "queries"], found: Int64[ndarray, "queries k"]) -> Bool[ndarray, "queries k"]:
    """All but one of each row: all but its own id, or but the last where it is absent or crowded out by copies."""
    is_own = found == own_ids[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return ~is_own


def candidate_depth(k: int, effort: Effort) -> int:
    """How many candidates a search for k takes from a large enough index."""
    return k * effort.candidates_per_hit + EXTRA_CANDIDATES


def measure_index(
    searcher: FaissSearcher, store: VectorStore, settings: IndexSettings
) -> tuple[RecallCurve, Effort, dict[str, Any]]:
    """The curve; the default effort, which reaches `settings.recall` or comes nearest; and the clock's part.

    The latter holds milliseconds of single queries, one for each point of the curve, and of exact search. Costs an
    exact search of some thousand queries.
    """
    num_held_out = len(_held_out(searcher, store, seed=settings.seed))
    at = min(settings.at, store.num_vectors - num_held_out - 1)
    if searcher.index_type.family == "flat" or not num_held_out:
        return RecallCurve(), Effort(), {"milliseconds": [], **_exact_timing(searcher, store, settings)}
    levels = sorted({*LEVELS, settings.recall} - {1.0})
    count = min(settings.num_measured_queries, num_held_out)
    while True:
        queries = MeasuredQueries.draw(searcher, store, count=count, at=at, seed=settings.seed)
        points = _points(searcher, queries, levels, asked=settings.recall)
        curve = RecallCurve(tuple(points))
        default = curve.effort_for(settings.recall) or points[-1].effort
        spread = float(queries.recalls(searcher, default).std())
        enough = min(
            int((spread / _LARGEST_STANDARD_ERROR) ** 2),
            max(settings.num_measured_queries, _LARGEST_TRUTH_OPERATIONS // (2 * store.num_vectors * store.dim)),
            num_held_out,
        )
        if enough <= count or points[-1].recall < settings.recall:
            break
        count = enough
    timings = {
        "milliseconds": [_milliseconds(searcher, queries.vectors, point.effort, at=at) for point in points],
        **_exact_timing(searcher, store, settings),
        "num_measured_queries": count,
        "standard_error": round(spread / count**0.5, 5),
    }
    return curve, default, timings


def with_margin(level: float) -> float:
    """What an effort must be measured to reach so that new queries reach `level`."""
    return level + min(_MARGIN, (1 - level) / 10)


def _points(
    searcher: FaissSearcher, queries: MeasuredQueries, levels: list[float], *, asked: float
) -> list[RecallPoint]:
    """Ascending in effort and in recall."""
    find = _partition_efforts if searcher.index_type.family == "ivf" else _graph_efforts
    points: list[RecallPoint] = []
    for effort in find(searcher, queries, [*map(with_margin, levels)], asked=with_margin(asked)):
        recall = round(float(queries.recalls(searcher, effort).mean()), 5)
        if not points or recall > points[-1].recall:
            points.append(RecallPoint(effort, recall))
    return points


def _partition_efforts(
    searcher: FaissSearcher, queries: MeasuredQueries, levels: list[float], *, asked: float
) -> Iterator[Effort]:
    """For each level the cheapest pair of probes and candidates; ends with the best pair there is."""
    places = _Partitions(searcher, queries)
    for level in track(levels, total=len(levels), description="measuring recall", unit="levels"):
        if level > asked and places.seconds(Effort(num_probes=places.probes_for(level)[0])) > places.worth_seconds:
            return
        best: tuple[float, Effort] | None = None
        for num_probes in places.probes_for(level):
            if best is not None and places.seconds(Effort(num_probes=num_probes)) >= best[0]:
                break
            recalls = places.recalls(num_probes)
            if recalls[-1] < level:
                if places.recalls(places.num_partitions)[-1] < level:
                    break  # not even with all partitions
                continue
            effort = Effort(num_probes=num_probes, candidates_per_hit=int((recalls >= level).argmax()) + 1)
            best = min(best or (np.inf, effort), (places.seconds(effort), effort), key=lambda pair: pair[0])
        if best is None:
            # As much as there is: the level is out of reach for these codes.
            most = _MOST_CANDIDATES_PER_HIT_OF[searcher.index_type.codec]
            yield Effort(num_probes=places.num_partitions, candidates_per_hit=most)
            return
        yield best[1]


class _Partitions:
    """What a raw search of an IVF index tells about all efforts with the same number of probes."""

    def __init__(self, searcher: FaissSearcher, queries: MeasuredQueries) -> None:
        self._searcher, self._queries = searcher, queries
        assert searcher.index is not None
        self._index: Any = searcher.index
        self.num_partitions = int(self._index.nlist)
        self._known: dict[int, Float64[ndarray, candidates_per_hit]] = {}
        quantizer, lists = self._index.quantizer, self._index.invlists
        _, closest = quantizer.search(queries.vectors, self.num_partitions)
        _, own = quantizer.search(searcher.vectors_of(queries.wanted.ravel()), 1)
        places = np.argsort(closest, axis=1)
        counts = np.bincount(
            np.take_along_axis(places, own.reshape(queries.wanted.shape), axis=1).ravel(), minlength=self.num_partitions
        )
        self._coverage = np.cumsum(counts) / queries.wanted.size
        sizes = np.array([lists.list_size(number) for number in range(self.num_partitions)])
        rates = nominal_rates(searcher.dim)
        exact_seconds = searcher.num_vectors * rates.exact_seconds
        self.worth_seconds = rates.call_seconds + _WORTH_OF_EXACT_SEARCH * exact_seconds
        self._scanned = np.cumsum(sizes[closest], axis=1).mean(axis=0)

    def probes_for(self, level: float) -> list[int]:
        """Ascending; fewer cannot reach `level`, whatever the codes are."""
        fewest = min(int(np.searchsorted(self._coverage, level)) + 1, self.num_partitions)
        return sorted({min(int(np.ceil(factor * fewest)), self.num_partitions) for factor in _PROBE_FACTORS})

    def recalls(self, num_probes: int) -> Float64[ndarray, "candidates_per_hit"]:
        """By the number of candidates per hit, from 1."""
        if num_probes not in self._known:
            most = _MOST_CANDIDATES_PER_HIT_OF[self._searcher.index_type.codec]
            efforts = [Effort(num_probes=num_probes, candidates_per_hit=number + 1) for number in range(most)]
            by_depth = recalls_by_depth(self._queries.candidates(self._searcher, efforts[-1]), self._queries.wanted)
            depths = [candidate_depth(self._queries.at, effort) for effort in efforts]
            self._known[num_probes] = by_depth[np.array(depths) - 1]
        return self._known[num_probes]

    def seconds(self, effort: Effort) -> float:
        """Nominal ones: the choice among efforts must not depend on the clock."""
        assert effort.num_probes is not None
        work = SearchWork(
            scanned=float(self._scanned[effort.num_probes - 1]),
            rescored=float(candidate_depth(self._queries.at, effort)),
        )
        dim = self._queries.vectors.shape[1]
        return query_seconds(self._searcher.index_type, work, dim, nominal_rates(dim), in_batches=False)


def _graph_efforts(
    searcher: FaissSearcher, queries: MeasuredQueries, levels: list[float], *, asked: float
) -> Iterator[Effort]:
    """For each level the least breadth; ends with the widest."""
    known: dict[int, float] = {}

    def recall_of(breadth: int) -> float:
        if breadth not in known:
            known[breadth] = float(queries.recalls(searcher, Effort(breadth=breadth)).mean())
        return known[breadth]

    breadth = least = candidate_depth(queries.at, Effort())
    for level in track(levels, total=len(levels), description="measuring recall", unit="levels"):
        if level > asked and breadth > searcher.num_vectors // 4:
            return
        breadth = least_reaching(
            level, recall_of, least=breadth, most=min(_WIDEST_BREADTH, max(least, searcher.num_vectors))
        )
        yield Effort(breadth=breadth)
        if recall_of(breadth) < level:
            return


def least_reaching(
    level: float, recall_of: Callable[[int], float], *, least: int, most: int, resolution: int = _RESOLUTION_OF_BREADTH
) -> int:
    """By doubling and bisection, to one part in `resolution`; `most` where even that does not reach `level`."""
    if recall_of(least) >= level:
        return least
    too_little, enough = least, min(2 * least, most)
    while recall_of(enough) < level:
        if enough == most:
            return most
        too_little, enough = enough, min(2 * enough, most)
    while enough - too_little > max(1, enough // resolution):
        middle = (too_little + enough) // 2
        too_little, enough = (too_little, middle) if recall_of(middle) >= level else (middle, enough)
    return enough


def recalls_by_depth(
    found: Int64[ndarray, "queries depth"], wanted: Int64[ndarray, "queries at"]
) -> Float64[ndarray, "depth"]:
    """For each d, the share of those wanted that is among the first d candidates of their query."""
    is_hit = np.zeros(found.shape, bool)
    for column in range(wanted.shape[1]):
        is_hit |= found == wanted[:, column, None]
    return np.cumsum(is_hit.sum(axis=0)) / wanted.size


def _exact_timing(searcher: FaissSearcher, store: VectorStore, settings: IndexSettings) -> dict[str, float]:
    rows = np.random.default_rng(settings.seed).integers(0, store.num_vectors, _TIMED_QUERIES)
    queries = np.asarray(store.vectors[np.sort(rows)], np.float32)
    return {"exact_milliseconds": _milliseconds(searcher, queries, None, at=min(settings.at, store.num_vectors))}


def _milliseconds(
    searcher: FaissSearcher, queries: Float32[ndarray, "queries dim"], effort: Effort | None, *, at: int
) -> float:
    """Median of single queries; exact search where `effort` is None."""
    parameters = SearchParameters(k=at, effort=effort, exact=effort is None)
    seconds: list[float] = []
    while len(seconds) < min(_TIMED_QUERIES, len(queries)) and sum(seconds) < _TIMED_SECONDS:
        started = time.perf_counter()
        searcher.search(queries[len(seconds), None], parameters)
        seconds.append(time.perf_counter() - started)
    return round(1000 * float(np.median(seconds)), 4)
