"""Google Landmarks v1: a CSV with the columns id and landmark_id, and the pictures that one could still download."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipelines.sources import SourcePicture, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_csv

_NO_LANDMARK = ("", "None")


class GoogleLandmarksV1(DataSet):
    """Rows without a landmark become the split `unlabelled`."""

    data_set: Literal["gldv1"] = "gldv1"
    csv: Path = Path("train.csv")
    """Columns id and landmark_id, others are ignored; relative to the data set's folder."""
    image_folder: Path = Path("images/train")
    """Holds ID.jpg; relative to the data set's folder."""
    max_missing_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The list holds addresses, and many of them are dead."""

    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 1_060_709, 12_894, "DELF paper"),
        OfficialCount("train", 1_225_029, 14_951, "Kaggle train.csv"),
    )
    missing_hint: ClassVar[str] = "Set image_folder to the folder that holds ID.jpg."

    def required_paths(self) -> list[str]:
        return [str(self.csv), str(self.image_folder)]

    def listed(self) -> Iterator[SourcePicture]:
        rows = list(read_csv(self.root / self.csv, ("id", "landmark_id")))
        for key, (image_id, landmark) in zip(safe_keys([image_id for image_id, _ in rows]), rows, strict=True):
            path = self.root / self.image_folder / f"{image_id}.jpg"
            if landmark in _NO_LANDMARK:
                yield SourcePicture(key, path, None, "unlabelled")
            else:
                yield SourcePicture(key, path, landmark, "train")
