"""Validation while training, on classes held out from the training split: the test split is never looked at.

Leave-one-out: every held-out picture is searched for among all others, exactly, by the encoder that a checkpoint would
hold. Which pictures form a batch, and which queries a block, does not depend on the number of processes, and neither do
the numbers, as long as each process computes with the same number of threads.
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from data_pipelines.decode import decode_image
from data_pipelines.shard_set import ShardSet
from data_pipelines.transforms import EvaluationTransform
from lookalike.collectives import sum_over_ranks
from lookalike.encoder import Encoder, embed_pixels
from lookalike.errors import DataError, DecodeError, SettingsError, TrainingError
from lookalike.ranking_metrics import Metric, average_precision_at_r, hit_rate_at_k, measure, with_missing_last
from lookalike.world import World
from training.validation_settings import ValidationSettings

# Similarities held at a time: 64 MB of float32. Results may depend on it in their last bits.
_BLOCK_ENTRIES = 1 << 24
_MOST_QUERIES = 256


def split_classes(
    labels: Int64[ndarray, "samples"],
    rows: Int64[ndarray, "rows"],
    class_names: Sequence[str],
    *,
    share: float,
    seed: int,
) -> tuple[Int64[ndarray, "training_rows"], Int64[ndarray, "validation_rows"]]:
    """Parts `rows` by classes: those of about `share` of all classes, and the others.

    On which side a class is, a hash of its name decides: other pictures, other classes and another order of classes
    move nothing, and a larger share only adds. Classes of one picture are held out like others; rows without a class
    stay in training, which refuses them.

    Args:
        labels: Class of every sample of the shard set; -1 where it has none.
        rows: Those of the training split.
        class_names: By label.
        share: Between 0 and 1.
    """
    # The last place is that of label -1.
    places = np.append(_places(class_names, seed=seed), 1.0)
    is_held_out = places[labels[rows]] < share
    return rows[~is_held_out], rows[is_held_out]


def pictures_to_validate(
    labels: Int64[ndarray, "samples"],
    rows: Int64[ndarray, "validation_rows"],
    class_names: Sequence[str],
    *,
    max_pictures: int | None,
    seed: int,
) -> Int64[ndarray, "pictures"]:
    """At most `max_pictures` of the held-out rows, ascending: whole classes, as many as fit, chosen by their names."""
    if max_pictures is None or len(rows) <= max_pictures:
        return np.sort(rows)
    classes, sizes = np.unique(labels[rows], return_counts=True)
    places = _places(class_names, seed=seed)
    chosen, num_pictures = [], 0
    for index in np.argsort(places[classes], kind="stable").tolist():
        if num_pictures + sizes[index] <= max_pictures:
            chosen.append(classes[index])
            num_pictures += int(sizes[index])
    return np.sort(rows[np.isin(labels[rows], chosen)])


class Validator:
    """The held-out pictures, and how well an encoder finds them; holds nothing that changes."""

    def __init__(
        self,
        shard_set: ShardSet,
        rows: Int64[ndarray, "validation_rows"],
        settings: ValidationSettings,
        *,
        world: World = World(),
        num_threads: int = 1,
    ) -> None:
        """
        Args:
            rows: All held-out rows, see `split_classes`.
            num_threads: That decode pictures.

        Raises:
            SettingsError: no held-out class has two pictures.
        """
        self._shard_set, self._settings, self._world, self._num_threads = shard_set, settings, world, num_threads
        self._rows = pictures_to_validate(
            shard_set.labels, rows, shard_set.class_names, max_pictures=settings.max_pictures, seed=settings.seed
        )
        self._labels = shard_set.labels[self._rows]
        _, sizes = np.unique(self._labels, return_counts=True)
        if not (sizes >= 2).any():
            raise SettingsError(
                f"validation: {len(rows)} pictures are held out, {len(self._rows)} of them are looked at, no two of "
                "one class. Raise validation.class_share or validation.max_pictures, or change validation.seed."
            )

    @property
    def num_pictures(self) -> int:
        return len(self._rows)

    def is_due(self, step: int, *, num_steps: int) -> bool:
        """Whether to validate once `step` steps are done."""
        return step % self._settings.steps_between == 0 or step == num_steps

    def validate(self, encoder: Encoder) -> dict[str, float]:
        """The numbers of a validation event: hit rates, MAP@R, `value` (what checkpoints are chosen by), counts, time.

        Every process gets the same; collective. Modes of modules and random states are left as they were. Needs an
        encoder whose weights each process holds whole.

        Raises:
            DataError: a picture cannot be decoded; the message names its key.
            TrainingError: embeddings are not finite.
        """
        started = time.perf_counter()
        embeddings = self._embed(encoder)
        if not bool(torch.isfinite(embeddings).all()):
            raise TrainingError(
                "validation: embeddings are not finite. Lower optimizer.lr or set optimizer.max_gradient_norm."
            )
        measured = leave_one_out(embeddings, torch.from_numpy(self._labels), ks=self._settings.ks, world=self._world)
        return {
            **measured,
            "value": measured[self._settings.chosen_by],
            "num_pictures": self.num_pictures,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _embed(self, encoder: Encoder) -> Float[Tensor, "pictures dim"]:
        """Embeddings of all pictures, on the encoder's device; each rank embeds whole batches."""
        device = encoder.mean.device
        embeddings = torch.zeros(self.num_pictures, encoder.dim, device=device)
        with _modes_restored(encoder), closing(self._batches(EvaluationTransform(encoder.settings.input))) as batches:
            for places, pixels in batches:
                embeddings[places.to(device)] = embed_pixels(encoder, pixels).to(device)
        # Each row is zero on all ranks but one.
        sum_over_ranks([embeddings], self._world)
        return embeddings

    def _batches(
        self, transform: EvaluationTransform
    ) -> Generator[tuple[Int64[Tensor, "batch"], UInt8[Tensor, "batch 3 height width"]], None, None]:
        """This rank's share of all batches, of one shape each: (places among the pictures, pixels).

        Threads decode the next batch while the caller works on one.
        """
        size = self._settings.batch_size
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="validation")
        ahead: list[tuple[int, Future[ndarray]]] = []
        try:
            for start in (*range(0, self.num_pictures, size)[self._world.rank :: self._world.size], None):
                places = range(0) if start is None else range(start, min(start + size, self.num_pictures))
                current, ahead = ahead, [(place, pool.submit(self._pixels, place, transform)) for place in places]
                by_shape: dict[tuple[int, ...], list[tuple[int, ndarray]]] = {}
                for place, future in current:
                    by_shape.setdefault(future.result().shape, []).append((place, future.result()))
                for pictures in by_shape.values():
                    own_places, pixels = zip(*pictures, strict=True)
                    yield torch.tensor(own_places), torch.from_numpy(np.stack(pixels))
        finally:
            pool.shutdown(cancel_futures=True)

    def _pixels(self, place: int, transform: EvaluationTransform) -> UInt8[ndarray, "3 height width"]:
        row = int(self._rows[place])
        try:
            return transform(decode_image(self._shard_set.read_bytes(row), limits=self._shard_set.decode_limits))
        except DecodeError as error:
            raise DataError(
                f"sample {self._shard_set.key(row)!r} (row {row} of {self._shard_set.folder}) cannot be decoded: "
                f"{error}. Check the shard set."
            ) from error


def leave_one_out(
    embeddings: Float[Tensor, "pictures dim"],
    labels: Int64[Tensor, "pictures"],
    *,
    ks: Sequence[int],
    world: World = World(),
) -> dict[str, float]:
    """Hit rates at k and MAP@R of every picture against all others: exact, in blocks, the blocks split over ranks.

    Equal similarities rank in the order of the rows. Pictures that are alone in their class are no queries.

    Raises:
        DataError: no class has two pictures.
    """
    _, members, sizes = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
    num_relevant = sizes[members] - 1
    queries = np.flatnonzero(num_relevant)
    if not len(queries):
        raise DataError("no class has two pictures, so no picture can be found by another.")
    # Queries of a block should need equally deep rankings.
    queries = queries[np.argsort(num_relevant[queries], kind="stable")]
    num_others = len(labels) - 1
    metrics: dict[str, Metric] = {f"hit_rate_at_{k}": partial(hit_rate_at_k, k=k) for k in ks}
    metrics["map_at_r"] = average_precision_at_r
    table = torch.zeros(len(queries), len(metrics), dtype=torch.float64)
    labels = labels.to(embeddings.device)
    block_size = max(1, min(_MOST_QUERIES, _BLOCK_ENTRIES // len(labels)))
    for start in range(0, len(queries), block_size)[world.rank :: world.size]:
        block = queries[start : start + block_size]
        # No metric looks further.
        depth = min(max(*ks, int(num_relevant[block].max())), num_others)
        relevance = _relevance(embeddings, labels, torch.from_numpy(block).to(embeddings.device), depth=depth)
        positions = [
            with_missing_last(np.flatnonzero(own), num_relevant=count, num_ranked=num_others)
            for own, count in zip(relevance, num_relevant[block].tolist(), strict=True)
        ]
        values = measure(metrics, positions)
        table[start : start + len(block)] = torch.from_numpy(np.stack(list(values.values()), axis=1))
    table = table.to(embeddings.device)
    sum_over_ranks([table], world)
    means: Float64[ndarray, metrics] = table.cpu().numpy().mean(axis=0)
    return {**dict(zip(metrics, means.tolist(), strict=True)), "num_queries": len(queries)}


def _relevance(
    embeddings: Float[Tensor, "pictures dim"],
    labels: Int64[Tensor, "pictures"],
    queries: Int64[Tensor, "queries"],
    *,
    depth: int,
) -> Bool[ndarray, "queries depth"]:
    """Whether each of the first `depth` pictures of a query's ranking is of its class."""
    similarities = embeddings[queries] @ embeddings.T
    similarities.scatter_(1, queries[:, None], -torch.inf)
    nearest = _first_columns(similarities, depth)
    return np.asarray((labels[nearest] == labels[queries, None]).cpu().numpy())


def _first_columns(similarities: Float[Tensor, "queries pictures"], depth: int) -> Int64[Tensor, "queries depth"]:
    """The columns of the highest values, highest first; equal values in the order of the columns."""
    values, columns = similarities.topk(depth, dim=1)
    # topk takes any of the values that are equal to the last it takes.
    is_torn = (similarities >= values[:, -1:]).sum(dim=1) > depth
    if bool(is_torn.any()):
        columns[is_torn] = similarities[is_torn].sort(dim=1, descending=True, stable=True).indices[:, :depth]
    columns = columns.sort(dim=1).values
    order = similarities.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


@contextmanager
def _modes_restored(encoder: Encoder) -> Iterator[None]:
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def _places(class_names: Sequence[str], *, seed: int) -> Float64[ndarray, "classes"]:
    """A uniform number in [0, 1) for each class: a hash of its name."""
    digests = [hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest() for name in class_names]
    return np.array([int.from_bytes(digest, "little") >> 11 for digest in digests], np.float64) * 2.0**-53
