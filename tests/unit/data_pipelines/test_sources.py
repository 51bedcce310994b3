"""What the sources list, in which order, and what they refuse."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines.settings import ClassFoldersSettings, ListingSettings
from data_pipelines.sources import safe_keys
from data_pipelines.sources.class_folders import ClassFolders
from data_pipelines.sources.listing import Listing
from lookalike.errors import DataError
from tests.drawn_pictures import draw_picture


def touch(root: Path, *names: str) -> Path:
    """Sources read no picture, so empty files will do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path, **settings) -> list[tuple[str, str | None, str]]:
    source = ClassFolders(ClassFoldersSettings(folder=root, **settings))
    return [(picture.key, picture.label, picture.split) for picture in source.pictures()]


def test_class_folders_without_splits(tmp_path):
    touch(tmp_path, "b c/2.JPG", "b c/1.png", "a/1.jpg", "a/notes.txt", "a/.hidden.jpg", ".git/x.jpg", "a/deep/er.webp")
    assert listed(tmp_path) == [
        ("a/1", "a", "all"),
        ("a/deep/er", "a", "all"),
        ("b_c/1", "b c", "all"),
        ("b_c/2", "b c", "all"),
    ]


def test_given_splits_are_recognised(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/b/1.jpg")
    assert listed(tmp_path) == [("test/b/1", "b", "test"), ("train/a/1", "a", "train")]


def test_a_flat_folder_has_no_classes(tmp_path):
    assert listed(touch(tmp_path, "2.jpg", "1.jpg")) == [("1", None, "all"), ("2", None, "all")]


def test_test_classes_are_stable_when_classes_are_added(tmp_path):
    touch(tmp_path, *(f"class {n}/1.jpg" for n in range(30)))
    before = {label: split for _, label, split in listed(tmp_path, test_class_share=0.4)}
    touch(tmp_path, *(f"new {n}/1.jpg" for n in range(30)))
    after = {label: split for _, label, split in listed(tmp_path, test_class_share=0.4)}
    assert set(before.values()) == {"train", "test"}
    assert {label: after[label] for label in before} == before
    assert before != {label: split for _, label, split in listed(tmp_path, test_class_share=0.4, seed=1)}


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, "holds no pictures"),
        (["a/notes.txt"], {}, "holds no pictures"),
        (["train/a/1.jpg", "test/a/1.jpg"], {}, "1 of 1 classes are in more than one split, first 'a'"),
        (["train/a/1.jpg", "test/b/1.jpg", "loose.jpg"], {}, "loose.jpg is in neither"),
        (["train/a/1.jpg", "test/b/1.jpg"], {"test_class_share": 0.5}, "has the splits train and test already"),
        (["a/1.jpg", "loose.jpg"], {}, "1 pictures are in no class folder, such as loose.jpg"),
        (["1.jpg"], {"test_class_share": 0.5}, "has no class folders"),
        (["a/1.jpg"], {"test_class_share": 0.5}, "Choose another share or seed"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused(tmp_path, names, settings, message):
    with pytest.raises(DataError, match=message):
        listed(touch(tmp_path, *names), **settings)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        listed(tmp_path / "nowhere")


def test_shared_classes_can_be_allowed(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/a/1.jpg")
    assert len(listed(tmp_path, allows_shared_classes=True)) == 2


def test_keys_are_safe_and_distinct():
    keys = safe_keys(["ä/1.2.jpg", "a/1.jpg", "a/1.png", "__x__/1.jpg", "a/.b", "a b/no suffix"])
    assert keys[0] == "_/1_2"
    assert keys[1].startswith("a/1-")
    assert keys[2].startswith("a/1-")
    assert keys[3:] == ["_x_/1", "a/_b", "a_b/no_suffix"]
    assert len(set(keys)) == len(keys)


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_listing_reads_alike_from_csv_and_parquet(tmp_path):
    touch(tmp_path, "x/1.jpg", "x/2.jpg")
    rows = [
        {"path": "x/2.jpg", "label": "007", "coarse_label": "agents", "split": "train"},
        {"path": "x/1.jpg", "label": "", "coarse_label": "", "split": ""},
    ]
    write_csv(tmp_path / "list.csv", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    for name in ("list.csv", "list.parquet"):
        pictures = Listing(ListingSettings(file=tmp_path / name)).pictures()
        assert [(p.key, p.label, p.coarse_label, p.split) for p in pictures] == [
            ("x/1", None, None, "all"),
            ("x/2", "007", "agents", "train"),
        ]
        assert pictures[0].path == tmp_path / "x/1.jpg"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "1.jpg"}], "has no column `path`; it has file"),
        ([{"path": "3.jpg"}, {"path": "1.jpg"}], "1 of 2 files do not exist, first '3.jpg'"),
        ([{"path": "1.jpg", "key": "a"}, {"path": "2.jpg", "key": "a"}], "key 'a' occurs twice"),
        ([{"path": "1.jpg", "key": "a.b"}], "key 'a.b' may only hold"),
        ([{"path": "1.jpg", "key": "__a__"}], "key '__a__' may only hold"),
        ([{"path": "1.jpg", "split": "../x"}], "split '../x' may only hold"),
        ([{"path": "1.jpg"}, {"path": "1.jpg"}], "occurs twice"),
    ],
)
def test_listings_that_cannot_be_used_are_refused(tmp_path, rows, message):
    touch(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(DataError, match=message):
        Listing(ListingSettings(file=write_csv(tmp_path / "list.csv", rows))).pictures()


def test_a_listing_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"no parquet")
    for name in ("list.parquet", "nowhere.csv"):
        with pytest.raises(DataError, match=name):
            Listing(ListingSettings(file=tmp_path / name)).pictures()


def test_a_link_back_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    draw_picture(0, 0).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match="listed already"):
        ClassFolders(ClassFoldersSettings(folder=tmp_path)).pictures()


@pytest.mark.parametrize("depth", ["class", "class/deeper"])
def test_a_folder_that_cannot_be_listed_is_an_error_not_a_missing_class(tmp_path, monkeypatch, depth):
    for name in ("other", depth):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        draw_picture(0, 0).save(tmp_path / name / "x.png")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == tmp_path / depth:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be listed: Permission denied"):
        ClassFolders(ClassFoldersSettings(folder=tmp_path)).pictures()


@pytest.mark.parametrize("header", ["path,label,label", "path,path"])
def test_a_listing_with_a_column_twice_is_refused(tmp_path, header):
    (tmp_path / "listing.csv").write_text(f"{header}\n{',' * header.count(',')}\n")
    with pytest.raises(DataError, match=r"listing\.csv cannot be read as a listing"):
        Listing(ListingSettings(file=tmp_path / "listing.csv")).pictures()


@pytest.mark.parametrize("labels", [[["a"], ["b"]], [{"x": 1}, {"x": 2}], [b"\xff", b"\xfe"]])
def test_a_parquet_listing_whose_labels_are_no_text_is_refused(tmp_path, labels):
    parquet.write_table(pyarrow.table({"path": ["a.png", "b.png"], "label": labels}), tmp_path / "listing.parquet")
    with pytest.raises(DataError, match=r"listing\.parquet cannot be read as a listing"):
        Listing(ListingSettings(file=tmp_path / "listing.parquet")).pictures()
