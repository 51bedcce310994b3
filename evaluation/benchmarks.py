"""The benchmarks by name: which splits of their shards are queries and gallery, and how answers are judged.

A new benchmark of pictures with classes is an entry here; how its files become shards is said in
`data_pipelines/sources/`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lookalike.errors import SettingsError

Kind = Literal["classes", "landmarks", "retrieval"]
ClassProtocol = Literal["leave_one_out", "random_gallery", "query_gallery"]


@dataclass(frozen=True, slots=True)
class ClassBenchmark:
    """Pictures of one class should find each other."""

    name: str
    ks: tuple[int, ...]
    gallery_split: str | None = "test"  # None: all pictures of the shard set
    query_split: str | None = None  # None: the gallery's own pictures
    protocols: tuple[ClassProtocol, ...] = ("leave_one_out",)

    @property
    def kind(self) -> Kind:
        return "classes"


@dataclass(frozen=True, slots=True)
class LandmarkBenchmark:
    """Revisited Oxford or Paris; its ground truth names the pictures."""

    name: Literal["roxford5k", "rparis6k"]
    num_database: int
    gallery_split: str = "gallery"
    query_split: str = "query"

    @property
    def kind(self) -> Kind:
        return "landmarks"


@dataclass(frozen=True, slots=True)
class RetrievalBenchmark:
    """Google Landmarks v2: a solution names the relevant pictures of each query."""

    name: Literal["gldv2"] = "gldv2"
    gallery_split: str = "index"
    query_split: str = "test"

    @property
    def kind(self) -> Kind:
        return "retrieval"


Benchmark = ClassBenchmark | LandmarkBenchmark | RetrievalBenchmark

_BENCHMARKS: tuple[Benchmark, ...] = (
    ClassBenchmark("sop", ks=(1, 10, 100, 1000)),
    ClassBenchmark("cars196", ks=(1, 2, 4, 8, 16)),
    ClassBenchmark("cub200", ks=(1, 2, 4, 8, 16)),
    ClassBenchmark("inat2018", ks=(1, 4, 16, 32)),
    *(
        # Leave-one-out is what the RS@k line of papers reports, a random gallery what the data set's authors meant.
        ClassBenchmark(f"vehicleid_{size}", (1, 5), f"test_{size}", protocols=("leave_one_out", "random_gallery"))
        for size in (800, 1600, 2400)
    ),
    # Any shard set with classes; the command line may name other splits.
    ClassBenchmark("classes", ks=(1, 5, 10), gallery_split=None),
    LandmarkBenchmark("roxford5k", num_database=4_993),
    LandmarkBenchmark("rparis6k", num_database=6_322),
    RetrievalBenchmark(),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _BENCHMARKS}


def find_benchmark(
    name: str,
    *,
    ks: tuple[int, ...] | None = None,
    gallery_split: str | None = None,
    query_split: str | None = None,
) -> Benchmark:
    """A benchmark by name, with other k or splits where they are given.

    Raises:
        SettingsError: there is no such benchmark, or it is not judged at k.
    """
    if name not in BENCHMARKS:
        raise SettingsError(f"there is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    if gallery_split:
        benchmark = replace(benchmark, gallery_split=gallery_split)
    if isinstance(benchmark, ClassBenchmark):
        if gallery_split or query_split:
            # Of other pictures, so no number of the benchmark may stand beside it.
            benchmark = replace(benchmark, name="classes")
        if query_split:
            benchmark = replace(benchmark, query_split=query_split, protocols=("query_gallery",))
        return replace(benchmark, ks=ks) if ks else benchmark
    if ks:
        raise SettingsError(f"{name} has its own k: --ks is for benchmarks with classes.")
    return replace(benchmark, query_split=query_split) if query_split else benchmark
