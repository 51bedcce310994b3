"""CUB-200-2011: birds; classes 1-100 train, classes 101-200 test, whatever `train_test_split.txt` says."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from data_pipelines.sources import SourcePicture, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_rows
from lookalike.errors import DataError

_NUM_TRAIN_CLASSES = 100


class Cub200(DataSet):
    data_set: Literal["cub200"] = "cub200"

    archive_folder: ClassVar[str] = "CUB_200_2011"
    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 5_864, 100),
        OfficialCount("test", 5_924, 100),
    )
    are_classes_disjoint: ClassVar[bool] = True

    def required_paths(self) -> list[str]:
        return ["images.txt", "image_class_labels.txt", "classes.txt", "images"]

    def listed(self) -> Iterator[SourcePicture]:
        names = dict(read_rows(self.root / "images.txt", num_columns=2))
        class_of_image = dict(read_rows(self.root / "image_class_labels.txt", num_columns=2))
        class_names = dict(read_rows(self.root / "classes.txt", num_columns=2))
        for key, (image_id, name) in zip(safe_keys(list(names.values())), names.items(), strict=True):
            class_id = class_of_image.get(image_id)
            if class_id not in class_names or not class_id.isdecimal():
                raise DataError(f"{self.root}: image {image_id} ({name}) has no class, found {class_id!r}.")
            split = "train" if int(class_id) <= _NUM_TRAIN_CLASSES else "test"
            yield SourcePicture(key, self.root / "images" / name, class_names[class_id], split)
