"""Public data sets in miniature: the official folders, file names and list formats, with drawn pictures."""

import io
import json
import pickle
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.unit.data_pipelines.small_shards import write_picture


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def draw(root: Path, names: Iterable[str], **options) -> None:
    for seed, name in enumerate(sorted(names)):
        write_picture(root / name, seed, **options)


def sop(root: Path) -> Path:
    folder = root / "Stanford_Online_Products"
    rows = {
        "train": ["1 1 1 bicycle_final/111085122871_0.JPG", "2 1 1 bicycle_final/111085122871_1.JPG"],
        "test": ["59552 11319 2 chair_final/251952414262_0.JPG", "59553 11320 2 chair_final/251952414262 1.JPG"],
    }
    for split, lines in rows.items():
        write_text(folder / f"Ebay_{split}.txt", "\n".join(["image_id class_id super_class_id path", *lines]) + "\n")
        draw(folder, (line.split(" ", 3)[3] for line in lines))
    write_text(folder / "bicycle_final.txt", "not a list of pictures\n")
    return root


CAR_NAMES = ["AM General Hummer SUV 2000", *(f"Car {n}" for n in range(2, 197))]
CAR_NAMES[97] = "Ram C/V Cargo Van Minivan 2012"


def cars196(root: Path) -> Path:
    """The flag `test` contradicts the classes' halves, as it does in the original."""
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    rows = [(f"car_ims/{n:06d}.jpg", 1, 2, 30, 20, number, n % 2) for n, number in enumerate((1, 98, 99, 196), 1)]
    annotations = np.empty((1, len(rows)), dtype=[(name, object) for name in fields])
    annotations[0, :] = rows
    draw(root, (row[0] for row in rows))
    savemat(
        root / "cars_annos.mat",
        {"annotations": annotations, "class_names": np.array([CAR_NAMES], dtype=object)},
    )
    return root


def cars196_by_class(root: Path) -> Path:
    """Both halves count from 00001.jpg; the folder of a class with a slash in its name is called otherwise."""
    write_text(root / "names.csv", "\n".join(CAR_NAMES) + "\n")
    halves = {"train": {1: "00001.jpg", 98: "00002.jpg"}, "test": {99: "00001.jpg", 196: "00002.jpg"}}
    for half, names in halves.items():
        write_text(root / f"anno_{half}.csv", "".join(f"{name},1,2,30,20,{n}\n" for n, name in names.items()))
        folder = root / "car_data" / "car_data" / half
        draw(folder, (f"{CAR_NAMES[n - 1].replace('/', '-')}/{name}" for n, name in names.items()))
    return root


def cub200(root: Path) -> Path:
    folder = root / "CUB_200_2011"
    names = {
        1: "001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg",
        2: "100.Brown_Pelican/Brown_Pelican_0002_95000.jpg",
        3: "101.White_Pelican/White_Pelican_0003_95001.jpg",
    }
    write_text(folder / "images.txt", "".join(f"{n} {name}\n" for n, name in names.items()))
    write_text(folder / "image_class_labels.txt", "1 1\n2 100\n3 101\n")
    write_text(folder / "classes.txt", "".join(f"{int(n[:3])} {n.split('/')[0]}\n" for n in names.values()))
    write_text(folder / "train_test_split.txt", "1 0\n2 1\n3 1\n")
    draw(folder / "images", names.values())
    return root


def inat2018(root: Path) -> Path:
    lists = {"train": ["Aves/2917/aa.jpg", "Fungi/12/bb.jpg"], "test": ["Aves/2918/cc.jpg"]}
    for split, names in lists.items():
        lines = [f"train_val2018/{name}" for name in names]
        write_text(root / "Inat_dataset_splits" / f"Inaturalist_{split}_set1.txt", "\n".join(lines))
        draw(root, lines)
    return root


def vehicleid(root: Path) -> Path:
    """The list of 800 is part of that of 1600."""
    folder = root / "VehicleID_V1.0"
    lists = {
        "train_list": ["0279029 23781", "0000001 00007"],
        "test_list_800": ["0000012 10"],
        "test_list_1600": ["0000012 10", "0000013 11"],
        "test_list_2400": ["0000014 12"],
    }
    for name, lines in lists.items():
        write_text(folder / "train_test_split" / f"{name}.txt", "\n".join(lines) + "\n")
        draw(folder / "image", (f"{line.split()[0]}.jpg" for line in lines))
    return root


def gldv1(root: Path) -> Path:
    rows = ["a1,http://x/a,7", 'b2,"http://x/b,c",7', "c3,http://x/c,None", "d4,None,12"]
    write_text(root / "train.csv", "\n".join(["id,url,landmark_id", *rows]) + "\n")
    draw(root / "images" / "train", ["a1.jpg", "b2.jpg", "c3.jpg"])
    return root


def gldv2(root: Path) -> Path:
    ids = {"train": ["0011223344556677", "0123456789abcdef"], "index": ["ffee000000000000"], "test": ["ab0", "cd0"]}
    for part, names in ids.items():
        draw(root / part, (f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg" for name in names))
    write_text(root / "train.csv", "".join(f"{line}\n" for line in ["id,url,landmark_id", "0011223344556677,u,3"]))
    write_text(root / "train_clean.csv", "landmark_id,images\n3,0011223344556677 0123456789abcdef\n")
    solution = ["id,images,Usage", "ab0,ffee000000000000,Public", "cd0,None,Ignored"]
    write_text(root / "retrieval_solution_v2.1.csv", "\n".join(solution) + "\n")
    return root


def revisited(root: Path, name: str, *, boxes: list[list[float]], size: tuple[int, int] = (64, 48)) -> Path:
    """As many queries as boxes, and three gallery pictures."""
    gallery = [f"all_souls_{n:06d}" for n in range(3)]
    queries = [f"oxford_{n:06d}" for n in range(len(boxes))]
    ground_truth = {
        "imlist": gallery,
        "qimlist": queries,
        "gnd": [{"bbx": box, "easy": [0], "hard": [1], "junk": [2]} for box in boxes],
    }
    folder = root / name
    draw(folder / "jpg", (f"{picture}.jpg" for picture in [*gallery, *queries]), size=size)
    (folder / f"gnd_{name}.pkl").write_bytes(pickle.dumps(ground_truth, protocol=2))
    return root


def r1m(root: Path) -> Path:
    """One of the 300 listed pictures was in no archive."""
    names = [f"{n % 100}/{n:04x}.jpg" for n in range(300)]
    folder = root / "revisitop1m"
    write_text(folder / "revisitop1m.txt", "\n".join(names) + "\n")
    draw(folder / "jpg", names[:-1], size=(9, 8))
    return root


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def webdataset(root: Path) -> Path:
    draw(root / "loose", [f"{n}.jpg" for n in range(4)])
    data = [(root / "loose" / f"{n}.jpg").read_bytes() for n in range(4)]
    tars = root / "tars"
    write_tar(tars / "train-000000.tar", {"a/0.jpg": data[0], "a/0.cls": "3\n", "a/1.jpg": data[1], "a/1.cls": "10"})
    record = {"label": 10, "class_name": "cat", "coarse_label": "animal"}
    write_tar(
        tars / "test-000000.tar",
        {"__meta__.json": "{}", "./b/2.JPG": data[2], "./b/2.json": json.dumps(record), "b/._2.jpg": "resource fork"},
    )
    write_tar(tars / "test-000001.tar", {f"{'deep/' * 40}3.seg.png": b"mask", f"{'deep/' * 40}3.jpg": data[3]})
    return tars
