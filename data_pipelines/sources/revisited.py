"""Revisited Oxford and Paris: `jpg/` and the ground truth, which names gallery, queries and the queries' boxes."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from data_pipelines.sources import SourcePicture, pixel_box, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from lookalike.errors import DataError


class RevisitedBuildings(DataSet):
    """Whole pictures of the split `gallery`, and of the split `query` only what is inside the official box."""

    ground_truth: Path | None = None
    """`.pkl`, `.mat` or `.json`; relative to the data set's folder. Default: the first of gnd_NAME.pkl, gnd_NAME.mat
    and gnd_NAME.json that is there."""

    missing_hint: ClassVar[str] = "All pictures lie directly in jpg/: flatten the folders of the Paris archives."

    def required_paths(self) -> list[str]:
        return [str(self._ground_truth()), "jpg"]

    def listed(self) -> Iterator[SourcePicture]:
        file = self.root / self._ground_truth()
        contents = read_ground_truth(file)
        for split, names in (("gallery", contents["imlist"]), ("query", contents["qimlist"])):
            for position, (key, name) in enumerate(
                zip(safe_keys([f"{name}.jpg" for name in names]), names, strict=True)
            ):
                box = _query_box(contents, position, file) if split == "query" else None
                yield SourcePicture(f"{split}/{key}", self.root / "jpg" / f"{name}.jpg", None, split, box=box)

    def _ground_truth(self) -> Path:
        if self.ground_truth is not None:
            return self.ground_truth
        official = [Path(f"gnd_{self.name()}{suffix}") for suffix in (".pkl", ".mat", ".json")]
        return next((file for file in official if (self.root / file).exists()), official[0])


class RevisitedOxford(RevisitedBuildings):
    data_set: Literal["roxford5k"] = "roxford5k"

    archive_folder: ClassVar[str] = "roxford5k"
    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("gallery", 4_993),
        OfficialCount("query", 70),
    )


class RevisitedParis(RevisitedBuildings):
    data_set: Literal["rparis6k"] = "rparis6k"

    archive_folder: ClassVar[str] = "rparis6k"
    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("gallery", 6_322),
        OfficialCount("query", 70),
    )


def read_ground_truth(file: Path) -> dict[str, Any]:
    """`imlist` and `qimlist`, names without suffix, and `gnd`, per query a dict with `bbx` and lists of positions.

    Positions count from 0, also from a `.mat`, where they count from 1.

    Raises:
        DataError: the file cannot be read, needs code to be read, or holds something else.
    """
    try:
        with file.open("rb") as stream:
            suffix = file.suffix.lower()
            if suffix == ".mat":
                # Its numbers are arrays, whose library the help and the other sources need not load.
                from data_pipelines.sources.revisited_mat import read_mat_ground_truth

                contents = read_mat_ground_truth(file)
            else:
                contents = json.load(stream) if suffix == ".json" else _PlainUnpickler(stream).load()
    except _NotPlain as error:
        raise DataError(
            f"{file} wants to call {error}, which the official ground truth does not. It was not opened: get it from "
            "its publisher, or convert it to .json."
        ) from None
    except DataError:
        raise
    except Exception as error:
        # The unpickler raises anything from EOFError to IndexError on damaged files.
        raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    is_complete = (
        isinstance(contents, dict)
        and all(_is_list_of(str, contents.get(name)) for name in ("imlist", "qimlist"))
        and _is_list_of(dict, contents.get("gnd"))
        and len(contents["gnd"]) == len(contents["qimlist"])
    )
    if not is_complete:
        raise DataError(f"{file} should hold imlist, qimlist and, for each name of the latter, an entry of gnd.")
    return dict(contents)


class _NotPlain(Exception):
    """Names what a pickle wants to call."""


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, text and numbers only: a pickle that names a class or function could run anything."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise _NotPlain(f"{module_name}.{global_name}")


def _query_box(contents: dict[str, Any], position: int, file: Path) -> tuple[int, int, int, int]:
    corners = contents["gnd"][position].get("bbx")
    try:
        return pixel_box(corners)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: query {position} ({contents['qimlist'][position]}) has no box: {error}.") from error


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)
