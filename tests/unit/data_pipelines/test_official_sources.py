"""Public data sets in their official layouts become shards with the protocol's splits, classes and keys."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.settings import Reencode
from data_pipelines.sources import pixel_box
from data_pipelines.sources.registry import DATA_SETS, open_data_set
from lookalike.errors import DataError, SettingsError
from tests.unit.data_pipelines import miniatures
from tests.unit.data_pipelines.opened_data_sets import listed, shards_of

BOXES = [[10.5, 4.5, 40.49, 30.5], [0, 0, 64, 48]]


def roxford5k(root: Path) -> Path:
    return miniatures.revisited(root, "roxford5k", boxes=BOXES)


def rparis6k(root: Path) -> Path:
    return miniatures.revisited(root, "rparis6k", boxes=BOXES)


# name, miniature, (split, key, class name, coarse label) of every sample in order
CASES = {
    "sop": (
        "sop",
        miniatures.sop,
        [
            ("test", "chair_final/251952414262_0", "11319", "chair"),
            ("test", "chair_final/251952414262_1", "11320", "chair"),
            ("train", "bicycle_final/111085122871_0", "1", "bicycle"),
            ("train", "bicycle_final/111085122871_1", "1", "bicycle"),
        ],
    ),
    "cars196": (
        "cars196",
        miniatures.cars196,
        [
            ("test", "car_ims/000003", "099.Car 99", None),
            ("test", "car_ims/000004", "196.Car 196", None),
            ("train", "car_ims/000001", "001.AM General Hummer SUV 2000", None),
            ("train", "car_ims/000002", "098.Ram C/V Cargo Van Minivan 2012", None),
        ],
    ),
    "cars196 by class": (
        "cars196",
        miniatures.cars196_by_class,
        [
            ("test", "car_data/car_data/test/Car_196/00002", "196.Car 196", None),
            ("test", "car_data/car_data/test/Car_99/00001", "099.Car 99", None),
            (
                "train",
                "car_data/car_data/train/AM_General_Hummer_SUV_2000/00001",
                "001.AM General Hummer SUV 2000",
                None,
            ),
            (
                "train",
                "car_data/car_data/train/Ram_C-V_Cargo_Van_Minivan_2012/00002",
                "098.Ram C/V Cargo Van Minivan 2012",
                None,
            ),
        ],
    ),
    "cub200": (
        "cub200",
        miniatures.cub200,
        [
            ("test", "101_White_Pelican/White_Pelican_0003_95001", "101.White_Pelican", None),
            (
                "train",
                "001_Black_footed_Albatross/Black_Footed_Albatross_0001_796111",
                "001.Black_footed_Albatross",
                None,
            ),
            ("train", "100_Brown_Pelican/Brown_Pelican_0002_95000", "100.Brown_Pelican", None),
        ],
    ),
    "inat2018": (
        "inat2018",
        miniatures.inat2018,
        [
            ("test", "train_val2018/Aves/2918/cc", "Aves/2918", "Aves"),
            ("train", "train_val2018/Aves/2917/aa", "Aves/2917", "Aves"),
            ("train", "train_val2018/Fungi/12/bb", "Fungi/12", "Fungi"),
        ],
    ),
    "vehicleid": (
        "vehicleid",
        miniatures.vehicleid,
        [
            ("test_1600", "test_1600/0000012", "10", None),
            ("test_1600", "test_1600/0000013", "11", None),
            ("test_2400", "test_2400/0000014", "12", None),
            ("test_800", "test_800/0000012", "10", None),
            ("train", "train/0000001", "00007", None),
            ("train", "train/0279029", "23781", None),
        ],
    ),
    "gldv1": (
        "gldv1",
        miniatures.gldv1,
        [("train", "a1", "7", None), ("train", "b2", "7", None), ("unlabelled", "c3", None, None)],
    ),
    "gldv2": (
        "gldv2",
        miniatures.gldv2,
        [
            ("index", "index/ffee000000000000", None, None),
            ("test", "test/ab0", None, None),
            ("test", "test/cd0", None, None),
            ("train_clean", "train_clean/0011223344556677", "3", None),
            ("train_clean", "train_clean/0123456789abcdef", "3", None),
        ],
    ),
    **{
        name: (
            name,
            miniature,
            [
                *(("gallery", f"gallery/all_souls_{n:06d}", None, None) for n in range(3)),
                *(("query", f"query/oxford_{n:06d}", None, None) for n in range(2)),
            ],
        )
        for name, miniature in {"roxford5k": roxford5k, "rparis6k": rparis6k}.items()
    },
    "r1m": (
        "r1m",
        miniatures.r1m,
        [("gallery", key, None, None) for key in sorted(f"r1m/{n % 100}/{n:04x}" for n in range(299))],
    ),
    "webdataset": (
        "webdataset",
        miniatures.webdataset,
        [
            ("test", "b/2", "cat", "animal"),
            ("test", f"{'deep/' * 40}3", None, None),
            ("train", "a/0", "3", None),
            ("train", "a/1", "10", None),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_official_layout_becomes_shards(case, tmp_path):
    name, make_miniature, expected = CASES[case]
    with shards_of(name, make_miniature(tmp_path)) as shard_set:
        found = [
            (sample["split"], sample["key"], sample["class_name"], sample["coarse_label"])
            for sample in shard_set.samples.to_pylist()
        ]
        assert found == expected
        facts = shard_set.manifest.details["data_set"]
    assert facts["name"] == name
    stated = [(count["split"], count["num_images"]) for count in facts["counts"]]
    assert stated == [(count.split, count.num_images) for count in DATA_SETS[name].official_counts] or name == "gldv2"
    for count in facts["counts"]:
        of_split = [entry for entry in expected if entry[0] == count["split"]]
        assert count["num_images_found"] == len(of_split)
        assert count["num_classes_found"] == len({entry[2] for entry in of_split} - {None})


def test_every_data_set_has_a_miniature_and_a_page():
    assert {name for name, _, _ in CASES.values()} == set(DATA_SETS)
    page = Path(miniatures.__file__).parents[3].joinpath("docs", "data.md").read_text()
    for name, data_set in DATA_SETS.items():
        assert f"`{name}`" in page
        for count in data_set.official_counts:
            assert f"{count.num_images:,}" in page


def test_pictures_keep_their_bytes(tmp_path):
    root = miniatures.sop(tmp_path)
    with shards_of("sop", root) as shard_set:
        original = root / "Stanford_Online_Products" / "chair_final" / "251952414262 1.JPG"
        assert shard_set.read_bytes(1) == original.read_bytes()


def test_the_folder_of_its_own_name_may_be_given_too(tmp_path):
    root = miniatures.sop(tmp_path)
    assert listed("sop", root) == listed("sop", root / "Stanford_Online_Products")


def test_one_list_of_vehicles_can_be_chosen(tmp_path):
    root = miniatures.vehicleid(tmp_path)
    assert listed("vehicleid", root, "lists=[test_800]") == [("test_800", "test_800/0000012", "10")]


def test_only_scored_queries_of_landmarks_v2(tmp_path):
    root = miniatures.gldv2(tmp_path)
    assert listed("gldv2", root, "parts=[test]", "only_scored_queries=true") == [("test", "test/ab0", None)]
    assert listed("gldv2", root, "parts=[train]") == [("train", "train/0011223344556677", "3")]
    with pytest.raises(SettingsError, match="a selection of train"):
        open_data_set("gldv2", root, ["parts=[train, train_clean]"])
    with pytest.raises(SettingsError, match="no effect without the part test"):
        open_data_set("gldv2", root, ["parts=[index]", "only_scored_queries=true"])


def test_a_landmark_with_more_pictures_than_a_csv_field_may_hold(tmp_path):
    root = miniatures.gldv2(tmp_path)
    images = " ".join(["0011223344556677", *(f"{n:016x}" for n in range(10_000))])
    miniatures.write_text(root / "train_clean.csv", f"landmark_id,images\n3,{images}\n")
    examination = open_data_set("gldv2", root, ["parts=[train_clean]"]).examine()
    assert (len(examination.pictures), len(examination.missing_pictures)) == (1, 10_000)


# Query crops


def test_query_crops_follow_the_box_and_lose_nothing(tmp_path):
    root = roxford5k(tmp_path)
    with shards_of("roxford5k", root) as shard_set:
        rows = shard_set.rows("query").tolist()
        for row, box in zip(rows, BOXES, strict=True):
            sample = shard_set.samples.slice(row, 1).to_pylist()[0]
            name = sample["key"].removeprefix("query/")
            with Image.open(root / "roxford5k" / "jpg" / f"{name}.jpg") as image:
                expected = image.convert("RGB").crop(box)
            (tmp_path / "crop.png").write_bytes(shard_set.read_bytes(row))
            with Image.open(tmp_path / "crop.png") as crop:
                assert (crop.format, crop.size) == ("PNG", expected.size)
                assert crop.tobytes() == expected.tobytes()
            assert (sample["width"], sample["height"], sample["extension"]) == (*expected.size, "png")
        gallery = int(shard_set.rows("gallery")[0])
        assert shard_set.read_bytes(gallery) == (root / "roxford5k" / "jpg" / "all_souls_000000.jpg").read_bytes()


def test_boxes_are_rounded_as_pillow_does():
    for box in ([0.5, 1.5, 10.5, 11.5], [0.49, 0.51, 9.49, 9.51], [3, 4, 5, 6]):
        left, top, right, bottom = pixel_box(box)
        assert Image.new("RGB", (20, 20)).crop(box).size == (right - left, bottom - top)
    assert pixel_box([0.5, 1.5, 2.5, 3.5]) == (0, 2, 2, 4)


def test_a_reencoded_crop_shrinks_as_much_as_its_whole_picture(tmp_path):
    with shards_of("roxford5k", roxford5k(tmp_path), encoding=Reencode(max_side=32)) as shard_set:
        sizes = [(s["width"], s["height"]) for s in shard_set.samples.to_pylist()]
    # Gallery 64 x 48 -> 32 x 24; crops of 30 x 26 and 64 x 48 by the same half.
    assert sizes == [(32, 24)] * 3 + [(15, 13), (32, 24)]


def test_a_box_beyond_the_picture_is_clipped_or_quarantined(tmp_path):
    boxes = [[50, 40, 200, 200], [100, 100, 200, 200]]
    root = miniatures.revisited(tmp_path, "roxford5k", boxes=boxes)
    with shards_of("roxford5k", root, max_quarantine_share=0.5) as shard_set:
        (row,) = shard_set.rows("query").tolist()
        sample = shard_set.samples.slice(row, 1).to_pylist()[0]
        assert (sample["width"], sample["height"]) == (14, 8)
        assert shard_set.manifest.details["num_quarantined"] == 1


def test_another_box_is_another_plan(tmp_path):
    plain = shards_of("roxford5k", roxford5k(tmp_path / "one")).fingerprint
    other = miniatures.revisited(tmp_path / "two", "roxford5k", boxes=[BOXES[0], [0, 0, 64, 47]])
    assert shards_of("roxford5k", other).fingerprint != plain


def test_ground_truth_reads_alike_from_pickle_and_json(tmp_path):
    root = roxford5k(tmp_path)
    pickled = root / "roxford5k" / "gnd_roxford5k.pkl"
    before = open_data_set("roxford5k", root).pictures()
    miniatures.write_text(pickled.with_suffix(".json"), json.dumps(pickle.loads(pickled.read_bytes())))
    pickled.unlink()
    assert open_data_set("roxford5k", root).pictures() == before


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"imlist": Harmful()}), "wants to call builtins.print"),
        (pickle.dumps({"imlist": Path("x")}), "wants to call pathlib"),
        (b"\x80\x02}", "cannot be read"),
        (b"", "cannot be read"),
        (pickle.dumps([1, 2]), "should hold imlist, qimlist"),
        (pickle.dumps({"imlist": ["a"], "qimlist": ["b"], "gnd": []}), "should hold imlist, qimlist"),
        (pickle.dumps({"imlist": ["a"], "qimlist": ["b"], "gnd": [{}]}), r"query 0 \(b\) has no box"),
        (pickle.dumps({"imlist": ["a"], "qimlist": ["b"], "gnd": [{"bbx": [4, 4, 4, 9]}]}), "is empty"),
        (pickle.dumps({"imlist": ["a"], "qimlist": ["b"], "gnd": [{"bbx": [1, 2, 3, float("nan")]}]}), "has no box"),
    ],
)
def test_ground_truth_that_is_not_plain_data_is_refused(tmp_path, capfd, content, message):
    root = roxford5k(tmp_path)
    (root / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data_set("roxford5k", root).pictures()
    assert "this ran" not in capfd.readouterr().out


# Layouts that are incomplete or contradict themselves


@pytest.mark.parametrize(
    ("name", "make_miniature", "file", "content", "message"),
    [
        (
            "sop",
            miniatures.sop,
            "Stanford_Online_Products/Ebay_train.txt",
            "1 1 1 a.JPG\n",
            "should start with the line",
        ),
        (
            "sop",
            miniatures.sop,
            "Stanford_Online_Products/Ebay_train.txt",
            "image_id class_id super_class_id path\n1 1 a.JPG\n",
            "line 2: 4 columns are expected",
        ),
        (
            "sop",
            miniatures.sop,
            "Stanford_Online_Products/Ebay_train.txt",
            "image_id class_id super_class_id path\n1 11319 2 bicycle_final/111085122871_0.JPG\n",
            "1 of 2 classes are in more than one split, first '11319'",
        ),
        ("cars196", miniatures.cars196, "cars_annos.mat", "no matrix", "cannot be read as a MATLAB file"),
        (
            "cars196",
            miniatures.cars196_by_class,
            "anno_test.csv",
            "00001.jpg,1,1,2,2,197\n",
            "class '197' of 00001.jpg",
        ),
        (
            "cub200",
            miniatures.cub200,
            "CUB_200_2011/image_class_labels.txt",
            "1 1\n2 100\n",
            r"image 3 \(101.*no class",
        ),
        (
            "inat2018",
            miniatures.inat2018,
            "Inat_dataset_splits/Inaturalist_test_set1.txt",
            "cc.jpg\n",
            "is not of the form train_val2018/SUPER/CLASS/picture.jpg",
        ),
        (
            "vehicleid",
            miniatures.vehicleid,
            "VehicleID_V1.0/train_test_split/train_list.txt",
            "0279029 12\n",
            "1 of 3 classes are in more than one split, first '12'",
        ),
        (
            "gldv1",
            miniatures.gldv1,
            "train.csv",
            "image,landmark_id\na1,7\n",
            "has no column id; it has image, landmark_id",
        ),
        ("gldv1", miniatures.gldv1, "train.csv", "id,url,landmark_id\na1\n", "line 2: the row ends before column"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, name, make_miniature, file, content, message):
    root = make_miniature(tmp_path)
    miniatures.write_text(root / file, content)
    with pytest.raises(DataError, match=message):
        open_data_set(name, root).pictures()


def test_a_missing_list_or_picture_is_an_error_that_names_it(tmp_path):
    root = miniatures.cub200(tmp_path)
    (root / "CUB_200_2011" / "images" / "100.Brown_Pelican" / "Brown_Pelican_0002_95000.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 3 listed pictures are missing, first .*Brown_Pelican_0002_95000.jpg; 0.00%"
    ):
        open_data_set("cub200", root).pictures()
    assert len(listed("cub200", root, "max_missing_share=0.4")) == 2
    (root / "CUB_200_2011" / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes.txt is missing. `lookalike data verify cub200"):
        open_data_set("cub200", root).pictures()


def test_a_missing_archive_of_distractors_is_an_error(tmp_path):
    root = miniatures.r1m(tmp_path)
    shutil.rmtree(root / "revisitop1m" / "jpg" / "7")
    with pytest.raises(DataError, match=r"4 of 300 listed .* Unpack all 100 archives"):
        open_data_set("r1m", root).pictures()


def test_an_unknown_name_lists_the_known_ones_and_settings_are_checked(tmp_path):
    with pytest.raises(SettingsError, match="there is no data set 'cars': choose from sop, cars196"):
        open_data_set("cars", tmp_path)
    with pytest.raises(SettingsError, match="lists"):
        open_data_set("vehicleid", tmp_path, ["lists=[test_3200]"])
    with pytest.raises(SettingsError, match="csv"):
        open_data_set("sop", tmp_path, ["csv=x.csv"])
