"""The numbers of a run for TensorBoard, an optional dependency."""

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

from lookalike.errors import ResourceError


class EventBoard:
    """Scalars by step; a background thread writes them."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """
        Args:
            first_step: What an interrupted run wrote from here on is left out of the curves.

        Raises:
            ResourceError: tensorboard is not installed.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise ResourceError(
                "tensorboard: true needs TensorBoard, which is not installed. Install lookalike with the extra "
                "[tensorboard]: pip install 'lookalike[tensorboard]', or set tensorboard to false."
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, event: str, *, step: int, **values: Any) -> None:
        """Numbers become curves named `event/value`; what is no number is left to the event log."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> "EventBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
