"""Which classes look alike to the encoder of late: what batches of hard classes are made from."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from data_pipelines.hard_class_batches import nearest_classes
from lookalike.collectives import broadcast_from_first
from lookalike.world import World
from training.settings import HardClassSettings


class HardClasses:
    """Remembers where each class was embedded last, and from time to time which classes are near each other.

    A class is where the mean of its pictures' embeddings was when it was last in a batch. All processes see the
    embeddings of the global batch, so all hold the same, which a checkpoint stores: a resumed run has the same batches.
    """

    def __init__(self, classes: Int64[Tensor, "classes"], *, dim: int, settings: HardClassSettings) -> None:
        """
        Args:
            classes: All labels of the training pictures, ascending.
        """
        self._settings = settings
        self._classes = classes.cpu()
        self._centroids = torch.zeros(len(classes), dim)
        self._is_known = torch.zeros(len(classes), dtype=torch.bool)
        self._near: Int64[Tensor, "all_classes near"] | None = None

    @property
    def near_classes(self) -> Int64[ndarray, "all_classes near"] | None:
        """Of each label, other labels, nearest first; of a class that was not seen its own. None before any refresh."""
        return None if self._near is None else self._near.numpy()

    def observe(self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, "batch"]) -> None:
        """Takes in a global batch; the pictures of a class stand together, as class-balanced batches have them."""
        present, counts = labels.cpu().unique_consecutive(return_counts=True)
        means = torch.stack([group.mean(dim=0) for group in embeddings.detach().float().cpu().split(counts.tolist())])
        places = torch.searchsorted(self._classes, present)
        self._centroids[places] = means
        self._is_known[places] = True

    def refresh(self, *, device: torch.device, world: World) -> None:
        """Looks for the near classes anew: exact, on the first rank, for all; collective.

        Args:
            device: That this process communicates from.
        """
        known = self._classes[self._is_known]
        num_near = min(self._settings.num_near, max(1, len(known) - 1))
        # Labels without a place are their own neighbours, and no plan takes a class for its own.
        near = torch.arange(int(self._classes[-1]) + 1)[:, None].repeat(1, num_near)
        if world.is_first and len(known) > 1:
            found = nearest_classes(self._centroids[self._is_known].numpy(), num_near)
            near[known] = known[torch.from_numpy(found)]
        self._near = broadcast_from_first(near.to(device), world).cpu()

    def refresh_steps(self, *, num_steps: int, num_steps_per_epoch: int) -> range:
        """The steps before which to refresh."""
        first, between = self._settings.first_epoch, self._settings.epochs_between
        return range(first * num_steps_per_epoch, num_steps, between * num_steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"centroids": self._centroids, "is_known": self._is_known, "near": self._near}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._centroids, self._is_known, self._near = state["centroids"], state["is_known"], state["near"]
