"""`lookalike data write --dataset` and `verify` on public data sets."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipelines.settings import ShardSettings
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.registry import open_data_set
from tests.unit.data_pipelines import miniatures


def test_verify_names_what_is_missing(run, tmp_path):
    root = miniatures.vehicleid(tmp_path)
    code, out, _ = run("verify", "vehicleid", root)
    assert code == 0
    assert "train: 2 images of 2 classes; paper: 110,178 images of 13,134 classes, DIFFERS" in out
    assert "usable; 6 images found" in out
    (root / "VehicleID_V1.0" / "image" / "0000001.jpg").unlink()
    code, out, _ = run("verify", "vehicleid", root, "--json")
    result = json.loads(out)
    assert (code, result["is_usable"], result["images"]) == (3, False, 5)
    assert [Path(name).name for name in result["missing_pictures"]] == ["0000001.jpg"]
    shutil.rmtree(root / "VehicleID_V1.0" / "train_test_split")
    code, out, _ = run("verify", "vehicleid", root)
    assert code == 3
    assert "train_test_split/test_list_800.txt is missing" in out
    assert "NOT USABLE" in out
    assert run("verify", "vehicleid", tmp_path / "nowhere")[0] == 3
    assert run("verify", "vehicles", root)[0] == 2


def test_write_prints_and_keeps_how_counts_differ(run, tmp_path):
    root = miniatures.gldv1(tmp_path)
    arguments = ("write", root, tmp_path / "shards", "--dataset", "gldv1", "--processes", 1)
    code, out, _ = run(*arguments)
    assert code == 0
    assert "listed pictures without a file: 1" in out
    assert "train: 2 images of 1 classes; DELF paper: 1,060,709 images of 12,894 classes, DIFFERS" in out
    code, out, _ = run(*arguments, "--json")
    facts = json.loads(out)["data_set"]
    assert (code, facts["num_missing_pictures"], facts["counts"][1]["num_images"]) == (0, 1, 1_225_029)


def test_a_dry_run_estimates_time_and_writes_nothing(run, tmp_path):
    root = miniatures.inat2018(tmp_path)
    (root / "train_val2018" / "Aves" / "2917" / "aa.jpg").write_bytes(b"no picture")
    code, out, _ = run("write", root, tmp_path / "shards", "--dataset", "inat2018", "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, planned["images"], planned["shards"], planned["splits"]) == (0, 3, 2, ["test", "train"])
    assert 0 <= planned["estimated_seconds"] < 60
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dataset", "sops"], 2, "there is no data set 'sops'"),
        (["--dataset", "sop", "--seed", "1"], 2, "sop has its own splits"),
        (["--dataset", "sop"], 3, "Ebay_train.txt is missing; Ebay_test.txt is missing"),
        (["csv=x.csv"], 2, "'csv=x.csv' has no effect without --dataset"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(run, tmp_path, arguments, code, message):
    found, out, err = run("write", tmp_path, tmp_path / "out", *arguments)
    assert (found, out) == (code, "")
    assert message in err


def test_the_same_data_set_gives_the_same_bytes_with_any_number_of_processes(tmp_path):
    root = miniatures.r1m(tmp_path)
    source = open_data_set("r1m", root)
    settings = ShardSettings(max_shard_bytes=16 << 10)
    prints = {
        write_shards(source, tmp_path / str(number), settings, num_processes=number).fingerprint for number in (1, 2)
    }
    assert len(prints) == 1
