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
            )
        except ValueError as error:
            raise SettingsError(f"RANK, WORLD_SIZE and LOCAL_RANK do not describe a world: {error}") from error

    @property
    def is_first(self) -> bool:
        return self.rank == 0
