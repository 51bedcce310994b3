"""Index types worth a comparison."""

import math

from indexing.index_types import Codec, IndexType
from indexing.settings import IndexSettings
from lookalike.errors import SettingsError

# Below it, an exact scan takes less than any other search could save.
LARGEST_WITHOUT_TRIAL_BYTES = 8 << 20
# k-means places no meaningful centres with fewer.
FEWEST_PER_PARTITION = 8
FEWEST_OF_A_TRIAL = 20
_CODECS: tuple[Codec, ...] = ("Flat", "SQfp16", "SQ8", "RaBitQ")
_MOST_PARTITIONS = 65_536
_GRAPH_LINKS = 32
# Building a larger graph takes hours.
_LARGEST_GRAPH = 5_000_000


def candidate_types(num_vectors: int, dim: int, settings: IndexSettings) -> list[IndexType]:
    """What to compare; the named type alone where one is named. `Flat` comes first.

    Raises:
        SettingsError: `settings.type` names no index type, or one that needs more vectors.
    """
    if settings.type != "auto":
        named = IndexType.parse(settings.type)
        fewest = max(FEWEST_OF_A_TRIAL, FEWEST_PER_PARTITION * named.num_partitions)
        if named.family != "flat" and num_vectors < fewest:
            raise SettingsError(
                f"type: {named.name} needs at least {fewest:,} vectors, found {num_vectors:,}. "
                "Ask for Flat, or for fewer partitions."
            )
        return [named]
    flat = IndexType("flat")
    has_wishes = settings.ram is not None or settings.latency is not None
    is_small = 4 * num_vectors * dim <= LARGEST_WITHOUT_TRIAL_BYTES and not has_wishes
    # Only a search of everything can promise to miss nothing.
    is_exact = settings.mode == "evaluation" or settings.recall == 1
    if is_small or is_exact or num_vectors < FEWEST_OF_A_TRIAL:
        return [flat]
    types = [flat]
    for partitions in partition_counts(num_vectors):
        types += [IndexType("ivf", codec=codec, num_partitions=partitions) for codec in _CODECS]
    if num_vectors <= _LARGEST_GRAPH:
        types += [
            IndexType("hnsw", num_links=_GRAPH_LINKS),
            IndexType("hnsw", codec="SQ8", num_links=_GRAPH_LINKS),
        ]
    return types


def partition_counts(num_vectors: int) -> list[int]:
    """Powers of two about 4 √n and a quarter of it, the former as by FAISS's own guidelines."""
    finest = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    counts = {min(count, _MOST_PARTITIONS) for count in (finest // 4, finest)}
    return sorted(count for count in counts if 16 <= count <= num_vectors // FEWEST_PER_PARTITION)
