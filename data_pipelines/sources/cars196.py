"""Cars196: `car_ims/` with `cars_annos.mat`, or the pictures sorted into class folders with `anno_*.csv`.

The retrieval protocol ignores the publisher's train and test halves: classes 1-98 train, classes 99-196 test.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from data_pipelines.sources import SourcePicture, files_below, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_rows
from data_pipelines.sources.mat_files import read_mat
from lookalike.errors import DataError

_ANNOTATIONS = "cars_annos.mat"
_NUM_TRAIN_CLASSES = 98
_CLASS_COLUMN = 5  # of an annotation: path, four corners of a box, class, test


class Cars196(DataSet):
    """The annotated boxes are not cropped: the protocol takes whole pictures."""

    data_set: Literal["cars196"] = "cars196"

    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 8_054, 98),
        OfficialCount("test", 8_131, 98),
    )
    are_classes_disjoint: ClassVar[bool] = True

    def required_paths(self) -> list[str]:
        if self._is_sorted_by_class():
            return ["names.csv", "anno_train.csv", "anno_test.csv", "car_data/car_data"]
        return [_ANNOTATIONS, "car_ims"]

    def listed(self) -> Iterator[SourcePicture]:
        by_class = self._is_sorted_by_class()
        annotated = list(self._in_class_folders() if by_class else self._in_one_folder())
        keys = safe_keys([name for name, _, _ in annotated])
        for key, (name, number, class_name) in zip(keys, annotated, strict=True):
            split = "train" if number <= _NUM_TRAIN_CLASSES else "test"
            # The number makes the order of the classes the official one.
            yield SourcePicture(key, self.root / name, f"{number:03d}.{class_name}", split)

    def _is_sorted_by_class(self) -> bool:
        return not (self.root / _ANNOTATIONS).exists() and (self.root / "names.csv").exists()

    def _in_one_folder(self) -> Iterator[tuple[str, int, str]]:
        """Path, number and name of the class of each picture."""
        file = self.root / _ANNOTATIONS
        contents = read_mat(file)
        try:
            class_name = {number: str(name) for number, name in enumerate(contents["class_names"].ravel(), start=1)}
            for annotation in contents["annotations"].ravel():
                number = int(annotation[_CLASS_COLUMN])
                yield str(annotation[0]), number, class_name[number]
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{file} does not hold the annotations of Cars196: {error!r}") from error

    def _in_class_folders(self) -> Iterator[tuple[str, int, str]]:
        """Both halves count from 00001.jpg, and a folder's name differs from the class's where that has a slash."""
        class_names = [name.strip('"') for (name,) in read_rows(self.root / "names.csv", num_columns=1)]
        for half in ("train", "test"):
            folder = Path("car_data", "car_data", half)
            place = {path.name: path.relative_to(self.root) for path in files_below(self.root / folder)}
            file = self.root / f"anno_{half}.csv"
            for name, *_, number in read_rows(file, num_columns=_CLASS_COLUMN + 1, separator=","):
                if not number.isdecimal() or not 1 <= int(number) <= len(class_names):
                    raise DataError(f"{file}: class {number!r} of {name} is none of the {len(class_names)} names.")
                path = place.get(name, folder / class_names[int(number) - 1].replace("/", "-") / name)
                yield path.as_posix(), int(number), class_names[int(number) - 1]
