"""Existing WebDataset tars become shards."""

import gzip

import pytest

from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.registry import open_data_set
from lookalike.errors import DataError, SettingsError
from tests.unit.data_pipelines import miniatures
from tests.unit.data_pipelines.opened_data_sets import listed, shards_of
from tests.unit.data_pipelines.small_shards import SMALL_SHARDS, write_picture


def test_pictures_of_tars_keep_their_bytes(tmp_path):
    with shards_of("webdataset", miniatures.webdataset(tmp_path)) as shard_set:
        loose = [(tmp_path / "loose" / f"{n}.jpg").read_bytes() for n in (2, 3, 0, 1)]
        assert [shard_set.read_bytes(row) for row in range(4)] == loose
        assert shard_set.class_names == ["10", "3", "cat"]


def test_a_shard_set_is_read_back_to_the_same_samples(tmp_path, shard_set):
    again = write_shards(open_data_set("webdataset", shard_set.folder), tmp_path / "again", SMALL_SHARDS)
    columns = ["key", "class_name", "coarse_label", "split", "size", "sha256", "width", "height"]
    assert again.samples.select(columns).equals(shard_set.samples.select(columns))


def test_classes_of_tars_come_from_the_chosen_place(tmp_path):
    write_picture(tmp_path / "a.jpg", 0)
    picture = (tmp_path / "a.jpg").read_bytes()
    members = {"0.jpg": picture, "0.cls": "3", "0.txt": "cat\n", "0.json": '{"label": 5, "kind": "pet"}'}
    tar = miniatures.write_tar(tmp_path / "00000.tar", members)
    chosen = {
        (): "3",
        ("label_file=txt",): "cat",
        ("label_file=json",): "5",
        ("label_field=kind",): "pet",
    }
    for overrides, label in chosen.items():
        assert listed("webdataset", tar, *overrides) == [("all", "0", label)]
    assert listed("webdataset", tar, "split=train", "prefixes_keys=true") == [("train", "00000/0", "3")]
    for overrides, message in {
        ("label_field=colour",): "the json has no field 'colour'",
        ("picture_file=png",): "should hold one picture, found 0 among jpg, cls, txt, json",
    }.items():
        with pytest.raises(DataError, match=message):
            listed("webdataset", tar, *overrides)
    with pytest.raises(SettingsError, match="label_field has no effect"):
        listed("webdataset", tar, "label_file=cls", "label_field=kind")


def test_a_damaged_tar_is_named(tmp_path):
    tars = miniatures.webdataset(tmp_path)
    tar = tars / "train-000000.tar"
    whole = tar.read_bytes()
    second_header = 512 * (1 + -(-(tmp_path / "loose" / "0.jpg").stat().st_size // 512))
    for damaged in (
        whole[:second_header] + b"x" * 512 + whole[second_header + 512 :],  # tarfile alone ends quietly here
        whole[: second_header + 100],
        whole[: second_header - 600],
        whole[:second_header],
        whole + whole,
        b"no tar",
        b"",
    ):
        tar.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-000000\.tar"):
            open_data_set("webdataset", tars).pictures()


def test_a_compressed_tar_is_refused(tmp_path):
    tar = miniatures.write_tar(tmp_path / "0.tar", {"a.jpg": b"x"})
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(DataError, match="as an uncompressed tar"):
        open_data_set("webdataset", tmp_path).pictures()


def test_keys_that_start_again_in_every_tar_need_a_prefix(tmp_path):
    for number in range(2):
        miniatures.write_tar(tmp_path / f"train-{number}.tar", {"0.jpg": f"picture {number}"})
    with pytest.raises(DataError, match=r"key '0' occurs 2 times, first in .*train-0\.tar\. .*prefixes_keys"):
        listed("webdataset", tmp_path)
    keys = [key for _, key, _ in listed("webdataset", tmp_path, "prefixes_keys=true")]
    assert keys == ["train-0/0", "train-1/0"]
