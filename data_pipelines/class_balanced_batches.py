"""Which pictures form the batch of a step: P classes x K pictures, a pure function of seed and step."""

import math

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from lookalike.errors import DataError, SettingsError
from lookalike.world import World

# Keep the random streams of the three choices apart.
_REMAINDER_STREAM, _EPOCH_STREAM, _CLASS_STREAM = range(3)


class ClassBalancedBatches:
    """The batch plan. It holds no position: any step can be asked for at any time, at any world size.

    An epoch has floor(C / P) steps, which take disjoint classes in an order of its own. The remaining C mod P classes
    sit the epoch out; they are the next ones of one fixed circle of all classes, so every class sits out equally often.
    Each time a class comes up it takes K pictures, walking around a shuffled circle of its pictures. The circle is
    reshuffled after whole laps only, so at any time two pictures of a class differ by at most one use.
    """

    def __init__(
        self,
        labels: Int64[ndarray, "samples"],
        rows: Int64[ndarray, "rows"],
        *,
        classes_per_batch: int,
        images_per_class: int,
        seed: int,
        keeps_single_image_classes: bool = False,
    ) -> None:
        """
        Args:
            labels: Class of every sample of the shard set; -1 where it has none.
            rows: The samples to train on, such as those of one split.
            classes_per_batch: P, of the global batch.
            images_per_class: K; classes with fewer pictures repeat them as evenly as possible.
            seed: At least 0.
            keeps_single_image_classes: Whether classes with one picture take part, K times the same.

        Raises:
            DataError: a sample has no class, or there are fewer than P usable classes.
        """
        if classes_per_batch < 1 or images_per_class < 1 or seed < 0:
            raise ValueError(
                f"classes_per_batch ({classes_per_batch}) and images_per_class ({images_per_class}) must be at least "
                f"1, seed ({seed}) at least 0"
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.seed = seed
        self._rows_of_class = _group_rows(labels, rows, smallest=1 if keeps_single_image_classes else 2)
        self.num_classes = len(self._rows_of_class)
        if self.num_classes < classes_per_batch:
            least = "" if keeps_single_image_classes else " with two or more pictures"
            raise DataError(
                f"{classes_per_batch} classes per batch asked for, but there are {self.num_classes} classes{least} "
                f"in {len(rows)} samples. Lower classes_per_batch, or give more classes."
            )
        self.num_steps_per_epoch = self.num_classes // classes_per_batch
        self._epoch_order = (-1, np.empty(0, dtype=np.int64))
        # Place of each class on the circle that decides who sits out.
        self._place = self._permutation(self.num_classes, _REMAINDER_STREAM).argsort()

    def rows_of_step(self, step: int) -> Int64[ndarray, "batch"]:
        """Rows of the global batch, P * K of them; the K of a class stand together."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        epoch, batch = divmod(step, self.num_steps_per_epoch)
        start = batch * self.classes_per_batch
        classes = self._classes_of_epoch(epoch)[start : start + self.classes_per_batch]
        return np.concatenate(
            [self._rows_of_occurrence(index, self._occurrence(index, epoch)) for index in classes.tolist()]
        )

    def _classes_of_epoch(self, epoch: int) -> Int64[ndarray, "classes"]:
        """The classes that take part, in the order of their batches."""
        known, order = self._epoch_order
        if known != epoch:
            order = self._permutation(self.num_classes, _EPOCH_STREAM, epoch)
            order = self._arranged(order[~self._sits_out(order, epoch)], epoch)
            self._epoch_order = (epoch, order)
        return order

    def _arranged(self, classes: Int64[ndarray, "classes"], epoch: int) -> Int64[ndarray, "classes"]:
        """The same classes in the order of their batches; here the random one they come in."""
        return classes

    @property
    def _num_sitting_out(self) -> int:
        return self.num_classes - self.num_steps_per_epoch * self.classes_per_batch

    def _sits_out(self, classes: Int64[ndarray, "classes"], epoch: int) -> Bool[ndarray, "classes"]:
        first = epoch * self._num_sitting_out
        return (self._place[classes] - first) % self.num_classes < self._num_sitting_out

    def _occurrence(self, index: int, epoch: int) -> int:
        """How often a class took part before `epoch`: the epochs so far, less those it sat out."""
        # Epochs 0 .. epoch - 1 passed over the integers 0 .. epoch * remainder - 1, each the place of one class.
        passed = epoch * self._num_sitting_out
        times_sat_out = max(0, -((int(self._place[index]) - passed) // self.num_classes))
        return epoch - times_sat_out

    def _rows_of_occurrence(self, index: int, occurrence: int) -> Int64[ndarray, "images"]:
        rows, num_taken = self._rows_of_class[index], self.images_per_class
        occurrences_per_shuffle = len(rows) // math.gcd(len(rows), num_taken)
        circle = self._permutation(len(rows), _CLASS_STREAM, index, occurrence // occurrences_per_shuffle)
        places = (occurrence * num_taken + np.arange(num_taken)) % len(rows)
        return rows[circle[places]]

    def _permutation(self, length: int, *stream: int) -> Int64[ndarray, "length"]:
        return np.random.default_rng([self.seed, *stream]).permutation(length)


def rank_share(rows: Int64[ndarray, "batch"], world: World) -> Int64[ndarray, "share"]:
    """The equal, contiguous part of a global batch that one rank works on.

    Raises:
        SettingsError: the batch cannot be divided equally.
    """
    size, left_over = divmod(len(rows), world.size)
    if left_over:
        raise SettingsError(
            f"a global batch of {len(rows)} pictures cannot be divided equally among {world.size} ranks; "
            "choose classes_per_batch x images_per_class as a multiple of the number of ranks."
        )
    return rows[world.rank * size : (world.rank + 1) * size]


def _group_rows(
    labels: Int64[ndarray, "samples"], rows: Int64[ndarray, "rows"], *, smallest: int
) -> list[Int64[ndarray, "_"]]:
    """Rows of each class that has at least `smallest`, in the order of the class labels."""
    rows = np.sort(rows)
    own_labels = labels[rows]
    num_unlabelled = int((own_labels < 0).sum())
    if num_unlabelled:
        raise DataError(f"{num_unlabelled} of {len(rows)} samples have no class: class-balanced batches need one each.")
    order = np.argsort(own_labels, kind="stable")
    starts = np.flatnonzero(np.diff(own_labels[order], prepend=-1))
    return [group for group in np.split(rows[order], starts[1:]) if len(group) >= smallest]
