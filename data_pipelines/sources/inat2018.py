"""iNaturalist 2018 with the class-disjoint lists of Smooth-AP: `train_val2018/SUPER/CLASS/picture.jpg`."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from data_pipelines.sources import SourcePicture, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_rows
from lookalike.errors import DataError


class INaturalist2018(DataSet):
    data_set: Literal["inat2018"] = "inat2018"
    train_list: Path = Path("Inat_dataset_splits/Inaturalist_train_set1.txt")
    """One path a line; relative to the data set's folder."""
    test_list: Path = Path("Inat_dataset_splits/Inaturalist_test_set1.txt")
    """One path a line; relative to the data set's folder."""

    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 325_846, 5_690, "Smooth-AP"),
        OfficialCount("test", 136_093, 2_452, "Smooth-AP"),
    )
    are_classes_disjoint: ClassVar[bool] = True

    def required_paths(self) -> list[str]:
        return [str(self.train_list), str(self.test_list), "train_val2018"]

    def listed(self) -> Iterator[SourcePicture]:
        for split, file in (("train", self.root / self.train_list), ("test", self.root / self.test_list)):
            names = [name for (name,) in read_rows(file, num_columns=1)]
            for key, name in zip(safe_keys(names), names, strict=True):
                parts = name.split("/")
                if len(parts) < 4:
                    raise DataError(f"{file}: {name!r} is not of the form train_val2018/SUPER/CLASS/picture.jpg.")
                *_, group, class_id, _ = parts
                yield SourcePicture(key, self.root / name, f"{group}/{class_id}", split, group)
