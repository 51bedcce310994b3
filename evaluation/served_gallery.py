"""Which pictures of a shard set a running server holds, so that its answers are judged against exactly these."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from lookalike.api_answers import Hit, Item
from lookalike.errors import ManifestMismatch


@dataclass(frozen=True)
class ServedGallery:
    """The gallery of a benchmark, all of it held by a server, and what the server holds besides."""

    url: str
    keys: Sequence[str]  # of the shard set, by row
    is_gallery: Bool[ndarray, "samples"]
    strangers: frozenset[int]  # ids of pictures that are not in the shards, such as those added since

    @classmethod
    def of(cls, items: Iterable[Item], shard_set: ShardSet, split: str | None, url: str) -> "ServedGallery":
        """The rows of `split` (None: of all splits), once it is certain that the server holds them all and no others.

        Args:
            items: All of the server's, in ascending order of ids, as rows are.

        Raises:
            DataError: there is no such split.
            ManifestMismatch: the server's pictures are other ones; the message counts them.
        """
        keys = shard_set.samples["key"].to_pylist()
        gallery = shard_set.rows(split)
        rows: list[int] = []
        others: list[int] = []
        for item in items:  # a million of them would take a gigabyte
            (rows if item.id < len(keys) and keys[item.id] == item.key else others).append(item.id)
        held, strangers = np.array(rows, np.int64), frozenset(others)
        if not np.array_equal(held, gallery):
            num_found = int(np.isin(held, gallery).sum())
            where = f"split {split!r}" if split else "all splits"
            raise ManifestMismatch(
                f"{url} holds {len(held) + len(strangers):,} pictures, the gallery has {len(gallery):,} ({where} of "
                f"{shard_set.folder}). Of the server's, {num_found:,} are in this gallery, {len(held) - num_found:,} "
                f"in other splits, and {len(strangers):,} are not in these shards. {_advice(held, shard_set)}"
            )
        is_gallery = np.zeros(len(keys), bool)
        is_gallery[gallery] = True
        return cls(url, keys, is_gallery, strangers)

    def __call__(self, hits: tuple[Hit, ...]) -> Int64[ndarray, "_"]:
        """Rows of the hits, best first, without strangers: the others stand as if there were none.

        Raises:
            ManifestMismatch: a hit is neither in the gallery nor a stranger that was there before.
        """
        rows = [hit.id for hit in hits if hit.id not in self.strangers]
        known = {hit.id: hit.key for hit in hits}
        for row in rows:
            if row >= len(self.keys) or not self.is_gallery[row] or self.keys[row] != known[row]:
                raise ManifestMismatch(
                    f"{self.url} answered with picture {row} ({known[row]}), which it did not hold when the evaluation "
                    "began: its pictures were changed meanwhile. Run the evaluation again."
                )
        return np.array(rows, np.int64)

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.strangers:
            return ()
        return (
            f"Pictures of the server that are not in the shards ({len(self.strangers):,}), such as those added since "
            "its index was made, were left out of its answers.",
        )


def _advice(held: Int64[ndarray, "_"], shard_set: ShardSet) -> str:
    for split in shard_set.splits:
        if np.array_equal(held, shard_set.rows(split)):
            return f"It holds exactly split {split!r}: give --gallery-split {split}."
    sizes = ", ".join(f"{split} {len(shard_set.rows(split)):,}" for split in shard_set.splits)
    return (
        "Give the shards that its index was made from, and with --gallery-split the split "
        f"(here: {sizes}); pictures of the split that were deleted from the server must be put back."
    )
