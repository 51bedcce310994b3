"""Where a process stands among its peers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lookalike.errors import SettingsError


@dataclass(frozen=True, slots=True)
class World:
    """One process among `size`; a value that is passed on, never looked up."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.size}")

    @classmethod
    def detect(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Reads what torchrun and compatible launchers set; one process where they set nothing."""
        try:
            return cls(
                rank=int(environment.get("RANK", "0")),
                size=int(environment.get("WORLD_SIZE", "1")),
                local_rank=int(environment.get("LOCAL_RANK", "0")),
                local_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
            )
        except ValueError as error:
            raise SettingsError(
                f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE do not describe a world: {error}"
            ) from error

    def share_of_cores(self, num_cores: int) -> int:
        """Threads that each process of this machine may use so that together they use its cores."""
        return max(1, num_cores // self.local_size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0
