"""Public data sets: what their lists name, compared with the disk and with the published counts."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from data_pipelines.sources import SourcePicture, checked, refuse_shared_classes
from lookalike.errors import DataError
from lookalike.settings import Settings


@dataclass(frozen=True, slots=True)
class OfficialCount:
    """How many pictures and classes a split is said to have."""

    split: str
    num_images: int
    num_classes: int | None = None  # None where pictures have no classes, or nobody says
    stated_by: str = "publisher"


@dataclass(frozen=True, slots=True)
class CountComparison:
    """A published count beside what was found on disk, before any picture is decoded."""

    split: str
    stated_by: str
    num_images: int
    num_classes: int | None
    num_images_found: int
    num_classes_found: int

    @property
    def differs(self) -> bool:
        return self.num_images != self.num_images_found or self.num_classes not in (None, self.num_classes_found)

    @property
    def text(self) -> str:
        found = f"{self.split}: {_counted(self.num_images_found, self.num_classes_found)}"
        stated = _counted(self.num_images, self.num_classes)
        return f"{found}; {self.stated_by}: {f'{stated}, DIFFERS' if self.differs else 'the same'}"


@dataclass(frozen=True, slots=True)
class Examination:
    """What of a data set is on disk; no picture has been opened."""

    data_set: str
    folder: Path
    missing_paths: tuple[str, ...]  # files and folders without which nothing can be listed
    pictures: tuple[SourcePicture, ...]  # listed and there, in the order of their keys
    missing_pictures: tuple[str, ...]  # listed and not there
    counts: tuple[CountComparison, ...]
    max_missing_share: float
    missing_hint: str

    @property
    def problems(self) -> list[str]:
        """Why nothing can be written from it; empty where it can."""
        if self.missing_paths:
            return [f"{name} is missing" for name in self.missing_paths]
        num_missing, num_listed = len(self.missing_pictures), len(self.missing_pictures) + len(self.pictures)
        if num_listed == 0:
            return ["no picture is listed"]
        if not self.pictures or num_missing > self.max_missing_share * num_listed:
            problem = (
                f"{num_missing:,} of {num_listed:,} listed pictures are missing, first {self.missing_pictures[0]}; "
                f"{self.max_missing_share:.2%} may be (max_missing_share). {self.missing_hint}"
            )
            return [problem.strip(" .")]
        return []

    def require_usable(self) -> None:
        """Raises DataError where there are problems."""
        if self.problems:
            raise DataError(
                f"{self.data_set} in {self.folder}: {'; '.join(self.problems)}. "
                f"`lookalike data verify {self.data_set} {self.folder}` compares the whole layout."
            )

    def facts(self) -> dict[str, Any]:
        """What a manifest keeps of it: no path, so that copies of a data set give the same."""
        return {
            "name": self.data_set,
            "num_missing_pictures": len(self.missing_pictures),
            "counts": [asdict(comparison) for comparison in self.counts],
        }


class DataSet(Settings):
    """A `PictureSource` whose fields are its settings.

    A subclass names itself in a field `data_set`, and says which files must be there and what they list. This class
    compares that with the disk.
    """

    folder: Path
    """Where the data set was unpacked: the folder of its own name, or the one above."""
    max_missing_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """More listed pictures without a file than this share of all are an error; fewer are counted and left out."""

    archive_folder: ClassVar[str] = "."  # the folder of its own name
    official_counts: ClassVar[tuple[OfficialCount, ...]] = ()
    are_classes_disjoint: ClassVar[bool] = False  # a class may only be in one split
    missing_hint: ClassVar[str] = ""  # what is usually wrong where pictures are missing

    @property
    def root(self) -> Path:
        inner = self.folder / self.archive_folder
        return inner if inner.is_dir() else self.folder

    @abstractmethod
    def required_paths(self) -> Sequence[str]:
        """Files and folders below `root` that `listed` needs; absolute paths are taken as they are."""

    @abstractmethod
    def listed(self) -> Iterable[SourcePicture]:
        """Every picture that the lists name, whether its file is there or not.

        Raises:
            DataError: a list cannot be read; the message names file and line.
        """

    def expected_counts(self) -> Sequence[OfficialCount]:
        """Those of the splits that the settings choose."""
        return self.official_counts

    def examine(self) -> Examination:
        """Reads lists and looks for files; opens no picture.

        Raises:
            DataError: the lists contradict themselves.
        """
        missing_paths = tuple(name for name in self.required_paths() if not (self.root / name).exists())
        found: list[SourcePicture] = []
        missing: list[str] = []
        for picture in [] if missing_paths else self.listed():
            if picture.path.is_file():
                found.append(picture)
            else:
                missing.append(str(picture.path))
        if self.are_classes_disjoint:
            refuse_shared_classes(found, where=str(self.root))
        return Examination(
            data_set=self.name(),
            folder=self.folder,
            missing_paths=missing_paths,
            pictures=tuple(checked(found, where=str(self.root))) if found else (),
            missing_pictures=tuple(sorted(missing)),
            counts=_compared(self.expected_counts(), found),
            max_missing_share=self.max_missing_share,
            missing_hint=self.missing_hint,
        )

    def pictures(self) -> Sequence[SourcePicture]:
        examination = self.examine()
        examination.require_usable()
        return examination.pictures

    @classmethod
    def name(cls) -> str:
        return str(cls.model_fields["data_set"].default)


def _compared(expected: Sequence[OfficialCount], found: Sequence[SourcePicture]) -> tuple[CountComparison, ...]:
    num_images = Counter(picture.split for picture in found)
    classes = {(picture.split, picture.label) for picture in found if picture.label is not None}
    num_classes = Counter(split for split, _ in classes)
    return tuple(
        CountComparison(
            split=count.split,
            stated_by=count.stated_by,
            num_images=count.num_images,
            num_classes=count.num_classes,
            num_images_found=num_images[count.split],
            num_classes_found=num_classes[count.split],
        )
        for count in expected
    )


def _counted(num_images: int, num_classes: int | None) -> str:
    return f"{num_images:,} images" + (f" of {num_classes:,} classes" if num_classes else "")
