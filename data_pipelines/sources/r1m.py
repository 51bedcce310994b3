"""The million distractors of revisited Oxford and Paris: `jpg/` from 100 archives, and `revisitop1m.txt`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipelines.sources import SourcePicture, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_rows

_LIST = "revisitop1m.txt"


class RevisitedDistractors(DataSet):
    """One split `gallery` without classes; lines of the list are paths below `jpg/`, with their suffix."""

    data_set: Literal["r1m"] = "r1m"
    max_missing_share: Annotated[float, Field(ge=0, le=1)] = 0.005
    """The list is said to name pictures that no archive holds; one archive that was forgotten would be 1% of it."""

    archive_folder: ClassVar[str] = "revisitop1m"
    official_counts: ClassVar[tuple[OfficialCount, ...]] = (OfficialCount("gallery", 1_001_001),)
    missing_hint: ClassVar[str] = "Unpack all 100 archives into jpg/."

    def required_paths(self) -> list[str]:
        return [_LIST, "jpg"]

    def listed(self) -> Iterator[SourcePicture]:
        names = [name for (name,) in read_rows(self.root / _LIST, num_columns=1)]
        for key, name in zip(safe_keys(names), names, strict=True):
            yield SourcePicture(f"r1m/{key}", self.root / "jpg" / name, None, "gallery")
