"""Google Landmarks v2: `{train,index,test}/a/b/c/abc....jpg` with `train.csv` or `train_clean.csv`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipelines.sources import SourcePicture, files_below
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_csv, read_rows

Part = Literal["train", "train_clean", "index", "test"]

_SOLUTION = "retrieval_solution_v2.1.csv"


class GoogleLandmarksV2(DataSet):
    """Index and test pictures have no classes: which of them belong together is said by the retrieval solution."""

    data_set: Literal["gldv2"] = "gldv2"
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = ("train_clean", "index", "test")
    """Which parts to read, each a split; train_clean is a selection of train."""
    only_scored_queries: bool = False
    """Leave out the test pictures without an answer in retrieval_solution_v2.1.csv, which is nearly all of them."""

    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 4_132_914, 203_094),
        OfficialCount("train_clean", 1_580_470, 81_313),
        OfficialCount("index", 761_757),
        OfficialCount("test", 117_577),
    )

    @model_validator(mode="after")
    def _choices_have_an_effect(self) -> "GoogleLandmarksV2":
        if {"train", "train_clean"} <= set(self.parts):
            raise ValueError("train_clean is a selection of train: choose one of them")
        if self.only_scored_queries and "test" not in self.parts:
            raise ValueError("only_scored_queries has no effect without the part test")
        return self

    def required_paths(self) -> list[str]:
        lists = [f"{part}.csv" for part in self.parts if part in ("train", "train_clean")]
        solution = [_SOLUTION] if self.only_scored_queries else []
        return [*lists, *solution, *(_folder_of(part) for part in self.parts)]

    def expected_counts(self) -> list[OfficialCount]:
        chosen = set(self.parts) - ({"test"} if self.only_scored_queries else set())
        return [count for count in self.official_counts if count.split in chosen]

    def listed(self) -> Iterator[SourcePicture]:
        for part in self.parts:
            for image_id, landmark in self._entries(part):
                path = self.root / _folder_of(part) / Path(*image_id[:3]) / f"{image_id}.jpg"
                yield SourcePicture(f"{part}/{image_id}", path, landmark, part)

    def _entries(self, part: Part) -> Iterator[tuple[str, str | None]]:
        """Image id and landmark."""
        if part == "train":
            yield from (
                (image, landmark) for image, landmark in read_csv(self.root / "train.csv", ("id", "landmark_id"))
            )
        elif part == "train_clean":
            # Not as CSV: the largest landmark's list of images exceeds what that module takes as a field.
            rows = read_rows(self.root / "train_clean.csv", num_columns=2, separator=",", header="landmark_id,images")
            yield from ((image_id, landmark) for landmark, images in rows for image_id in images.strip('"').split())
        elif part == "test" and self.only_scored_queries:
            rows_of_solution = read_csv(self.root / _SOLUTION, ("id", "images"))
            yield from ((image_id, None) for image_id, images in rows_of_solution if images != "None")
        else:
            folder = self.root / part
            # Pictures lie three folders deep, each named by a character of the id; others are no part of the set.
            places = ((path, path.relative_to(folder).parts) for path in files_below(folder) if path.suffix == ".jpg")
            yield from ((path.stem, None) for path, parts in places if [len(p) for p in parts[:-1]] == [1, 1, 1])


def _folder_of(part: Part) -> str:
    return "train" if part == "train_clean" else part
