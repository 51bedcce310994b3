"""Settings of validation while training; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from lookalike.settings import Settings


class ValidationSettings(Settings):
    """Classes of the training split are held out, to choose the best checkpoint by. The test split stays unseen."""

    class_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the classes that are held out; which ones, their names decide."""
    seed: NonNegativeInt = 0
    """Another one holds out other classes. Not the run's own, so that runs of several seeds are judged alike."""
    steps_between: PositiveInt = 200
    """Validates every so many steps, and after the last one."""
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4, 16)
    """Of the hit rates."""
    max_pictures: Annotated[int, Field(ge=2)] | None = None
    """Embeds no more than so many, in whole classes; the other held-out classes are not looked at. null takes all."""
    chosen_by: Literal["map_at_r", "hit_rate_at_1"] = "map_at_r"
    """Of this number the best checkpoint has the highest."""
    patience: PositiveInt | None = None
    """Stops after so many validations without a new best one; null never stops early."""
    batch_size: PositiveInt = 64
    """Pictures embedded at a time."""

    @model_validator(mode="after")
    def _chooses_by_what_it_measures(self) -> "ValidationSettings":
        if self.chosen_by == "hit_rate_at_1" and 1 not in self.ks:
            raise ValueError("chosen_by hit_rate_at_1 needs 1 among ks")
        return self
