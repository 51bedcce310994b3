"""The ground truth of revisited Oxford and Paris in all its formats."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from scipy.io import savemat

from data_pipelines.sources.revisited import RevisitedOxford, read_ground_truth
from evaluation.revisited.ground_truth import GroundTruth, load_ground_truth
from lookalike.errors import DataError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "revisited"
SMALL: dict[str, Any] = {
    "imlist": ["all_souls_1", "b", "c"],
    "qimlist": ["q"],
    "gnd": [{"bbx": [1.5, 2.0, 30.25, 40.0], "easy": [1], "hard": [], "junk": [0, 2]}],
}


def write_mat(file: Path, contents: dict[str, Any], *, dtype: type = np.float64) -> Path:
    """The layout of the official `.mat`: rows of cells, a row of structs, positions from 1, doubles as MATLAB's are."""

    def cells(values: list[str]) -> ndarray:
        row = np.empty((1, len(values)), object)
        row[0, :] = values
        return row

    fields = ("bbx", "easy", "hard", "junk")
    gnd = np.empty((1, len(contents["gnd"])), [(name, object) for name in fields])
    for place, entry in enumerate(contents["gnd"]):
        gnd[0, place]["bbx"] = np.array([entry["bbx"]], np.float64)
        for name in fields[1:]:
            positions = np.array([entry[name]], dtype) + dtype(1)
            # MATLAB's [] has neither rows nor columns.
            gnd[0, place][name] = positions if len(entry[name]) else np.zeros((0, 0))
    savemat(file, {"imlist": cells(contents["imlist"]), "qimlist": cells(contents["qimlist"]), "gnd": gnd})
    return file


def same(found: GroundTruth, expected: GroundTruth) -> bool:
    """All but the checksum of the file."""
    plain = [dataclasses.asdict(dataclasses.replace(truth, sha256="")) for truth in (found, expected)]
    np.testing.assert_equal(plain[0], plain[1])
    return True


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_the_matlab_file_reads_as_the_pickle(name: str, tmp_path: Path) -> None:
    pickled = GOLDEN / f"gnd_{name}.pkl"
    contents = read_ground_truth(pickled)
    num_positions = {len(entry[kind]) for entry in contents["gnd"] for kind in ("easy", "hard", "junk")}
    assert {0, 1} <= num_positions or name == "rparis6k"  # lists that MATLAB stores as no list
    matlab = write_mat(tmp_path / f"gnd_{name}.mat", contents)
    assert same(load_ground_truth(matlab), load_ground_truth(pickled))
    assert load_ground_truth(matlab).sha256 != load_ground_truth(pickled).sha256


@pytest.mark.parametrize("dtype", [np.float64, np.uint16, np.int32])
def test_one_query_with_lists_of_none_and_one_is_read_from_each_format(dtype: type, tmp_path: Path) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(SMALL))
    (tmp_path / "gnd.json").write_text(json.dumps(SMALL))
    pickled = load_ground_truth(tmp_path / "gnd.pkl")
    assert pickled.labels[0].easy.tolist() == [1]
    assert same(load_ground_truth(tmp_path / "gnd.json"), pickled)
    assert same(load_ground_truth(write_mat(tmp_path / "gnd.MAT", SMALL, dtype=dtype)), pickled)
    alone = {**SMALL, "imlist": ["a"], "gnd": [{**SMALL["gnd"][0], "easy": [0], "junk": []}]}
    truth = load_ground_truth(write_mat(tmp_path / "alone.mat", alone))
    assert (truth.database_names, truth.query_names) == (("a",), ("q",))
    assert [rows.tolist() for rows in (truth.labels[0].easy, truth.labels[0].hard, truth.labels[0].junk)] == [
        [0],
        [],
        [],
    ]


def test_the_source_takes_the_matlab_file_where_there_is_no_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    write_mat(folder / "gnd_roxford5k.mat", SMALL)
    pictures = list(RevisitedOxford(folder=tmp_path).listed())
    assert [picture.split for picture in pictures] == ["gallery"] * 3 + ["query"]
    assert pictures[-1].box == (2, 2, 30, 40)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"imlist": ["a"]}, "qimlist"),
        ({"imlist": ["a"], "qimlist": ["q"], "gnd": np.zeros(1)}, "cannot be read"),
        ({"imlist": ["a"], "qimlist": ["q"], "gnd": {"easy": [1.0], "hard": [], "junk": []}}, "bbx"),
        (
            {"imlist": ["a"], "qimlist": ["q"], "gnd": {"bbx": [0, 0, 1, 1], "easy": [1.5], "hard": [], "junk": []}},
            "no whole numbers",
        ),
        (
            {"imlist": ["a"], "qimlist": ["q"], "gnd": {"bbx": [0, 0, 1, 1], "easy": [0.0], "hard": [], "junk": []}},
            "outside the 1",
        ),
        (
            {"imlist": ["a"], "qimlist": ["q", "r"], "gnd": {"bbx": [0, 0, 1, 1], "easy": 1, "hard": [], "junk": []}},
            "for each name",
        ),
    ],
)
def test_a_matlab_file_of_something_else_is_named(contents: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "gnd.mat"
    savemat(file, contents)
    with pytest.raises(DataError, match=message) as caught:
        load_ground_truth(file)
    assert str(file) in str(caught.value)
    file.write_bytes(b"MATLAB no more")
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        load_ground_truth(file)
