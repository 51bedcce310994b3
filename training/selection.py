"""Which validation was the best one so far, and whether it is so long ago that a run may stop."""

import math
from typing import Any


class Selection:
    """Remembers the best validation; part of a run's state. Every process observes the same values."""

    def __init__(self, *, patience: int | None = None) -> None:
        """
        Args:
            patience: Validations without a new best one after which the run is over; None never ends it.
        """
        self._patience = patience
        self.best_step: int | None = None
        self.best_value = -math.inf
        self._num_since_best = 0

    def observe(self, step: int, value: float) -> bool:
        """Takes in the validation after `step` steps; whether it is the best. Of equal ones the earlier stays best."""
        if value > self.best_value:
            self.best_step, self.best_value, self._num_since_best = step, value, 0
            return True
        self._num_since_best += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether patience has ended."""
        return self._patience is not None and self._num_since_best >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_value": self.best_value, "num_since_best": self._num_since_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_step, self.best_value = state["best_step"], state["best_value"]
        self._num_since_best = state["num_since_best"]
