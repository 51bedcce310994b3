"""PKU VehicleID: one folder of pictures and several lists; each list is a split of its own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipelines.sources import SourcePicture, refuse_shared_classes
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_rows

VehicleList = Literal["train", "test_800", "test_1600", "test_2400"]


class VehicleId(DataSet):
    """The small test lists may be parts of the large ones, so a picture is stored once per list, under `LIST/IMAGE`."""

    data_set: Literal["vehicleid"] = "vehicleid"
    lists: Annotated[tuple[VehicleList, ...], Field(min_length=1)] = ("train", "test_800", "test_1600", "test_2400")
    """Which lists to read."""

    archive_folder: ClassVar[str] = "VehicleID_V1.0"
    # The paper's table and the published files never agreed.
    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 113_346, 13_164, "published files"),
        OfficialCount("train", 110_178, 13_134, "paper"),
        OfficialCount("test_800", 6_493, 800, "published files"),
        OfficialCount("test_800", 7_332, 800, "paper"),
        OfficialCount("test_1600", 13_377, 1_600, "published files"),
        OfficialCount("test_1600", 12_995, 1_600, "paper"),
        OfficialCount("test_2400", 19_777, 2_400, "published files"),
        OfficialCount("test_2400", 20_038, 2_400, "paper"),
    )

    def required_paths(self) -> list[str]:
        return [*(_list_file(name) for name in self.lists), "image"]

    def expected_counts(self) -> list[OfficialCount]:
        return [count for count in self.official_counts if count.split in self.lists]

    def listed(self) -> list[SourcePicture]:
        pictures = [picture for name in self.lists for picture in self._listed_in(name)]
        sides = [replace(picture, split=picture.split.partition("_")[0]) for picture in pictures]
        refuse_shared_classes(sides, where=str(self.root))
        return pictures

    def _listed_in(self, name: VehicleList) -> Iterator[SourcePicture]:
        # Ids stay text: 0279029 is the file 0279029.jpg.
        for image_id, vehicle_id in read_rows(self.root / _list_file(name), num_columns=2):
            yield SourcePicture(f"{name}/{image_id}", self.root / "image" / f"{image_id}.jpg", vehicle_id, name)


def _list_file(name: VehicleList) -> str:
    side, _, size = name.partition("_")
    return f"train_test_split/{side}_list_{size}.txt" if size else f"train_test_split/{side}_list.txt"
