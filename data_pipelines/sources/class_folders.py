"""Pictures in one folder per class: ROOT/class/picture, ROOT/{train,test}/class/picture, or ROOT/picture."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.settings import ClassFoldersSettings
from data_pipelines.sources import (
    PICTURE_SUFFIXES,
    SourcePicture,
    checked,
    files_below,
    refuse_shared_classes,
    safe_keys,
)
from lookalike.errors import DataError

GIVEN_SPLITS = ("test", "train")

logger = logging.getLogger(__name__)


class ClassFolders:
    """The layout is recognised: folders `train` and `test` are splits, any others are classes."""

    def __init__(self, settings: ClassFoldersSettings) -> None:
        self.settings = settings

    def pictures(self) -> Sequence[SourcePicture]:
        root = self.settings.folder
        if not root.is_dir():
            raise DataError(f"{root} is not a folder.")
        names = _picture_names(root)
        pictures = [
            self._picture(key, name, has_given_splits=_has_given_splits(root))
            for key, name in zip(safe_keys(names), names, strict=True)
        ]
        _refuse_mixture(pictures, root)
        if not self.settings.allows_shared_classes:
            refuse_shared_classes(pictures, where=str(root))
        if self.settings.test_class_share is not None:
            self._require_both_splits(pictures)
        return checked(pictures, where=str(root))

    def _picture(self, key: str, name: str, *, has_given_splits: bool) -> SourcePicture:
        root, folders = self.settings.folder, name.split("/")[:-1]
        if has_given_splits:
            if self.settings.test_class_share is not None:
                raise DataError(f"{root} has the splits train and test already: leave test_class_share out.")
            if not folders or folders[0] not in GIVEN_SPLITS:
                raise DataError(f"{root} has the splits train and test, but {name} is in neither. Move it.")
            label = folders[1] if len(folders) > 1 else None
            return SourcePicture(key, root / name, label, folders[0])
        label = folders[0] if folders else None
        return SourcePicture(key, root / name, label, self._split_of(label))

    def _split_of(self, label: str | None) -> str:
        """Depends on the class's name and the seed only, so new classes never move old ones."""
        share = self.settings.test_class_share
        if share is None:
            return "all"
        if label is None:
            raise DataError(f"{self.settings.folder} has no class folders, so no share of the classes can be tested.")
        digest = hashlib.sha256(f"{self.settings.seed}/{label}".encode(errors="surrogateescape")).digest()
        return "test" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"

    def _require_both_splits(self, pictures: Sequence[SourcePicture]) -> None:
        missing = set(GIVEN_SPLITS) - {picture.split for picture in pictures}
        if pictures and missing and self.settings.test_class_share:
            num_classes = len({picture.label for picture in pictures})
            raise DataError(
                f"test_class_share {self.settings.test_class_share} with seed {self.settings.seed} leaves the split "
                f"{missing.pop()} of {self.settings.folder} without any of the {num_classes} classes. "
                "Choose another share or seed."
            )


def _picture_names(root: Path) -> list[str]:
    """Paths of pictures relative to `root`, sorted; other files are counted and reported."""
    names: list[str] = []
    others: list[str] = []
    for path in files_below(root):
        name = path.relative_to(root).as_posix()
        (names if path.suffix.lower() in PICTURE_SUFFIXES else others).append(name)
    if others:
        logger.info("%s: left out %d files that are no pictures by name, such as %s", root, len(others), min(others))
    return sorted(names)


def _has_given_splits(root: Path) -> bool:
    return all((root / split).is_dir() for split in GIVEN_SPLITS)


def _refuse_mixture(pictures: Sequence[SourcePicture], root: Path) -> None:
    loose = [picture.path for picture in pictures if picture.label is None]
    if loose and len(loose) < len(pictures):
        raise DataError(
            f"{root}: {len(loose)} pictures are in no class folder, such as {loose[0].name}, "
            f"and {len(pictures) - len(loose)} are in one. Move them into classes, or shard them on their own."
        )
