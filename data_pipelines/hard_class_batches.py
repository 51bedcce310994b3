"""Class-balanced batches in which classes that look alike meet each other."""

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from data_pipelines.class_balanced_batches import ClassBalancedBatches
from lookalike.products import product

_GROUP_STREAM = 3  # beside the streams of ClassBalancedBatches
_CHUNK = 1024


class HardClassBatches(ClassBalancedBatches):
    """The plan of `ClassBalancedBatches`, each batch made of groups of near classes.

    An epoch takes the same classes as often, only in another order: a class drawn at random, then the nearest ones that
    are not taken yet. Which groups form a batch is random, too. Where all near ones are taken, others fill the group.
    """

    def __init__(
        self,
        labels: Int64[ndarray, "samples"],
        rows: Int64[ndarray, "rows"],
        near_classes: Int64[ndarray, "classes near"],
        *,
        classes_per_group: int,
        classes_per_batch: int,
        images_per_class: int,
        seed: int,
        keeps_single_image_classes: bool = False,
    ) -> None:
        """
        Args:
            labels: See `ClassBalancedBatches`, as for the other arguments not named here.
            near_classes: Of each label, other labels, nearest first; see `nearest_classes`. Integers, so that all
                ranks that are given the same make the same batches.
            classes_per_group: Divides `classes_per_batch`.
        """
        super().__init__(
            labels,
            rows,
            classes_per_batch=classes_per_batch,
            images_per_class=images_per_class,
            seed=seed,
            keeps_single_image_classes=keeps_single_image_classes,
        )
        if classes_per_group < 1 or classes_per_batch % classes_per_group:
            raise ValueError(f"classes_per_group ({classes_per_group}) must divide classes_per_batch")
        self.classes_per_group = classes_per_group
        own_labels = np.array([labels[members[0]] for members in self._rows_of_class])
        index_of_label = np.full(max(len(near_classes), own_labels.max() + 1), -1)
        index_of_label[own_labels] = np.arange(self.num_classes)
        # -1 for classes that do not take part.
        self._near = index_of_label[near_classes[own_labels]]

    def _arranged(self, classes: Int64[ndarray, "classes"], epoch: int) -> Int64[ndarray, "classes"]:
        groups = _grouped(classes, self._near, self.classes_per_group)
        return groups[self._permutation(len(groups), _GROUP_STREAM, epoch)].reshape(-1)


def _grouped(
    classes: Int64[ndarray, "classes"], near: Int64[ndarray, "all_classes near"], size: int
) -> Int64[ndarray, "groups size"]:
    is_free = np.zeros(len(near) + 1, dtype=bool)  # one more, for -1
    is_free[classes] = True
    others = iter(classes.tolist())
    groups = []
    for first in classes.tolist():
        if is_free[first]:
            is_free[first] = False
            found = near[first][is_free[near[first]]][: size - 1]
            is_free[found] = False
            group = [first, *found.tolist()]
            while len(group) < size:
                other = next(others)
                if is_free[other]:
                    is_free[other] = False
                    group.append(other)
            groups.append(group)
    return np.array(groups)


def nearest_classes(centroids: Float[ndarray, "classes dim"], k: int) -> Int64[ndarray, "classes k"]:
    """The k other classes with the most similar centroids (cosine), best first; fewer classes give fewer columns.

    Exact; 512 dimensions and 100,000 classes take some 10^13 operations. Rounding may order near ties otherwise on
    another machine: compute it once for all ranks.
    """
    unit = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    k = min(k, len(unit) - 1)
    nearest = np.empty((len(unit), k), dtype=np.int64)
    for start in range(0, len(unit), _CHUNK):
        similarities = product(unit[start : start + _CHUNK], unit.T)
        own = np.arange(len(similarities))
        similarities[own, start + own] = -np.inf
        nearest[start : start + _CHUNK] = _lowest(np.negative(similarities, out=similarities), k)
    return nearest


def _lowest(values: Float[ndarray, "rows columns"], k: int) -> Int64[ndarray, "rows k"]:
    """Columns of the k lowest of each row, in order; of equal ones the first columns, as a stable sort has them."""
    if k == 0:
        return np.empty((len(values), 0), dtype=np.int64)
    found = np.sort(np.argpartition(values, k - 1, axis=1)[:, :k], axis=1)
    reached = np.take_along_axis(values, found, axis=1)
    # Of values equal to the k-th lowest, a partition takes any: rows that leave some out are done over.
    is_tied = (values <= reached.max(axis=1, keepdims=True)).sum(axis=1) > k
    lowest = np.take_along_axis(found, np.argsort(reached, axis=1, kind="stable"), axis=1)
    lowest[is_tied] = np.argsort(values[is_tied], axis=1, kind="stable")[:, :k]
    return lowest
