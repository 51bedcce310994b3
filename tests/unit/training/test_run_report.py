import json
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from data_pipelines.shard_set import ShardSet
from lookalike.errors import ArtifactError
from lookalike.progress import Progress, duration
from lookalike.world import World
from tests.unit.training.written_runs import begin_run, make_run, write_steps, write_validation
from training.reporting.comparison import compare_runs, differing_names, flat_settings, t_interval
from training.reporting.page import report_runs
from training.reporting.progress_note import progress_note
from training.reporting.run_history import read_run
from training.reporting.run_record import read_record, record_start


def test_repeated_steps_count_as_they_went_the_last_time(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    write_steps(run, range(6), loss=1.0)
    write_validation(run, 3, 0.3)
    write_validation(run, 6, 0.9)
    write_steps(run, range(3, 5), loss=2.0)  # resumed after step 3, and still going on
    history = read_run(run)
    assert history.column("loss") == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}, "step 5 of the start before is void"
    assert history.column("value", of="validations") == {3: 0.3}, "as is the validation after it"
    assert history.seconds == pytest.approx(5 * 20 / 10.0)
    assert (history.seed, history.recipe, history.is_finished) == (3, None, False)
    assert (history.final_loss, history.loss_name, history.images_per_second) == (2.0, "loss", 10.0)


def test_the_best_validation_is_the_first_of_equal_ones(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    for step, value in ((10, 0.5), (20, 0.7), (30, 0.7), (40, 0.6)):
        write_validation(run, step, value)
    history = read_run(run)
    assert (history.best_step, history.best_validation, history.final_validation) == (20, 0.7, 0.6)


@pytest.mark.parametrize("goes_on_in_the_same_line", [True, False])
def test_a_line_cut_off_by_a_kill_costs_that_line_alone(tmp_path: Path, goes_on_in_the_same_line: bool) -> None:
    run = begin_run(tmp_path / "run")
    write_steps(run, range(4), loss=1.0)
    path = run / "events-rank0.jsonl"
    whole = path.read_text()
    last = whole.splitlines()[-1]
    for length in range(len(last)):
        path.write_text(whole[: -len(last) - 1 + length])
        if goes_on_in_the_same_line:
            write_steps(run, range(3, 5), loss=2.0)
            assert read_run(run).column("loss") == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}
        else:
            assert list(read_run(run).steps) == [0, 1, 2]


def test_other_ranks_fill_in_what_the_first_has_lost(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run")
    write_steps(run, range(3), loss=1.0)
    for rank in (10, 2):
        write_steps(run, range(4), loss=float(rank), rank=rank)
    assert read_run(run).column("loss") == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}


def test_a_run_that_has_only_begun_has_no_numbers(tmp_path: Path) -> None:
    history = read_run(begin_run(tmp_path / "run"))
    assert history.images_per_second is history.seconds is history.final_loss is None
    assert history.final_validation is history.best_validation is history.best_step is None


def test_a_folder_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no training run"):
        read_run(tmp_path)
    (tmp_path / "settings.yaml").write_text("[")
    with pytest.raises(ArtifactError, match=r"settings\.yaml cannot be read"):
        read_run(tmp_path)
    (tmp_path / "settings.yaml").write_text("[1]")
    with pytest.raises(ArtifactError, match="holds a list"):
        read_run(tmp_path)


def record(run: Path, shard_set: ShardSet, step: int) -> None:
    record_start(
        run,
        shard_set,
        identity="i",
        recipe="r",
        step=step,
        world=World(0, 2),
        device=torch.device("cpu"),
        command="lookalike train a.yaml",
    )


def test_the_record_names_what_a_run_was_made_from_at_every_start(shard_set: ShardSet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (0, 40):
        record(run, shard_set, step)
    tree = read_record(run)
    assert (tree["identity"], tree["recipe"]) == ("i", "r")
    assert tree["shards"]["fingerprint"] == shard_set.fingerprint
    assert [start["step"] for start in tree["starts"]] == [0, 40]
    assert all(start["world_size"] == 2 and start["device"].startswith("cpu") for start in tree["starts"])
    assert {"lookalike", "torch", "commit"} <= tree["starts"][0]["versions"].keys()


def test_a_record_that_cannot_be_written_is_a_warning_and_a_damaged_one_begins_anew(
    shard_set: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        record(tmp_path / "file", shard_set, 0)
    assert "run record was not written" in caplog.text
    for damaged in ("{", json.dumps([1])):
        (tmp_path / "run.json").write_text(damaged)
        record(tmp_path, shard_set, 5)
        assert [start["step"] for start in read_record(tmp_path)["starts"]] == [5]


def test_the_progress_line_says_speed_time_left_loss_and_recall(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    note = progress_note(images_per_second=412.4, loss=0.5, loss_above_floor=0.1234, hit_rate_at_1=0.7131)
    assert note == "412 images/s, loss above floor 0.1234, hit rate@1 0.713"
    monkeypatch.setattr("lookalike.progress._SECONDS_TO_FIRST_LINE", 0.0)
    monkeypatch.setattr("lookalike.progress.time.monotonic", iter([0.0, 30.0]).__next__)
    with caplog.at_level("INFO"), Progress(131, description="training", unit="steps") as progress:
        progress.advance(note=note)
    assert caplog.messages == [f"training: 1/131 steps, 0.0/s, 65 min left, {note}"]
    note = progress_note(images_per_second=1.0, loss=0.5, loss_above_floor=None, hit_rate_at_1=0.0, best_validation=0.6)
    assert note == "1 images/s, loss 0.5000, hit rate@1 0.000, best validation 0.600"
    shown = [duration(seconds) for seconds in (0.0, 89.0, 90.0, 5400.0, 11_100.0)]
    assert shown == ["0 s", "89 s", "2 min", "1 h 30 min", "3 h 05 min"]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_the_interval_over_seeds_is_students(values: list[float]) -> None:
    interval = t_interval(values)
    assert interval.num_seeds == len(values)
    assert interval.mean == pytest.approx(statistics.fmean(values))
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error) if error else (values[0],) * 2
    # Both subtract nearly equal numbers: the tolerance is that of the larger ones.
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    assert (t_interval([0.3]).low, t_interval([0.3]).high) == (None, None)
    tree, lines = report_runs([make_run(tmp_path / "run", validations=[0.5])])
    (recipe,) = tree["recipes"]
    assert recipe["num_seeds"] == 1
    assert recipe["means"]["best_validation"] == {"mean": 0.5, "low": None, "high": None, "num_seeds": 1}
    assert not any("[" in line or "interval" in line for line in lines)


def test_runs_that_differ_by_their_seed_are_one_line_with_an_interval(tmp_path: Path) -> None:
    values = {0: 0.61, 1: 0.64, 2: 0.72}
    runs = [make_run(tmp_path / f"a{seed}", seed=seed, validations=[value, 0.2]) for seed, value in values.items()]
    other = make_run(tmp_path / "other", recipe="s", validations=[0.1])
    tree, lines = report_runs([runs[0], other, *runs[1:]])
    own, alone = tree["recipes"]
    assert (own["runs"], own["num_seeds"], alone["runs"]) == (["a0", "a1", "a2"], 3, ["other"])
    found = own["means"]["best_validation"]
    sample = list(values.values())
    low, high = stats.t.interval(0.95, 2, loc=np.mean(sample), scale=stats.sem(sample))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(sample), low, high))
    (mean,) = [line for line in lines if line.startswith("| mean")]
    assert "3 seeds" in mean
    assert f"{np.mean(sample):.4f} [{low:.4f}, {high:.4f}]" in mean


def test_a_seed_that_ran_twice_counts_once(tmp_path: Path) -> None:
    """Two runs of one seed are not two independent ones."""
    runs = [
        make_run(tmp_path / name, seed=seed, validations=[value])
        for name, seed, value in (("a", 0, 0.2), ("again", 0, 0.4), ("b", 1, 0.7))
    ]
    (recipe,) = report_runs(runs)[0]["recipes"]
    low, high = stats.t.interval(0.95, 1, loc=0.5, scale=stats.sem([0.3, 0.7]))
    found = recipe["means"]["best_validation"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.5, low, high))
    assert found["num_seeds"] == recipe["num_seeds"] == 2
    assert len(report_runs([runs[0], runs[0]])[0]["runs"]) == 1, "a folder that is given twice counts once"


def test_a_mean_over_seeds_leaves_out_unfinished_runs_unless_none_is_finished(tmp_path: Path) -> None:
    done = make_run(tmp_path / "done", seed=0, validations=[0.5])
    killed = [
        make_run(tmp_path / f"killed{seed}", seed=seed, num_steps=15, validations=[0.1], is_finished=False)
        for seed in (1, 2)
    ]
    tree, _ = report_runs([done, *killed])
    assert tree["recipes"][0]["counted_runs"] == ["done"]
    assert "killed1 is not finished: 15 of 40 steps are done" in tree["remarks"]
    assert any("left out" in remark and "killed1, killed2" in remark for remark in tree["remarks"])
    tree, _ = report_runs(killed)
    assert tree["recipes"][0]["counted_runs"] == ["killed1", "killed2"]


def test_a_run_is_told_in_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", validations=[0.3, 0.6, 0.4])
    (row,) = report_runs([run])[0]["runs"]
    assert row["last_hit_rate_at_1"] == pytest.approx(np.mean([36, 37, 38, 39]) / 40), "the last tenth of 40 steps"
    assert (row["best_validation"], row["final_validation"], row["best_step"]) == (0.6, 0.4, 20)
    assert (row["loss_name"], row["final_loss"]) == ("loss_above_floor", 0.5)
    assert (row["images_per_second"], row["steps"], row["num_planned_steps"]) == (10.0, 40, 40)
    assert row["seconds"] == pytest.approx(40 * 20 / 10.0)
    assert (row["name"], row["run"], row["is_finished"]) == ("run", str(run), True)


def test_a_killed_run_and_the_same_resumed_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=20, validations=[0.3, 0.9], is_finished=False)
    path = run / "events-rank0.jsonl"
    path.write_text(path.read_text()[:-30])  # the kill cut off the second validation
    (row,) = report_runs([run])[0]["runs"]
    assert (row["steps"], row["best_validation"]) == (20, 0.3)
    write_steps(run, range(15, 30), loss=2.0)
    (row,) = report_runs([run])[0]["runs"]
    assert (row["steps"], row["best_validation"]) == (30, 0.3)


def test_settings_that_differ_are_named_in_full(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", loss={"name": "x", "temperature": 0.1}, optimizer={"lr": 1, "ks": [1, 2]})
    second = make_run(tmp_path / "b", recipe="s", loss={"name": "y"}, optimizer={"lr": True, "ks": [1, 2]})
    tree, lines = report_runs([first, second])
    assert tree["differing_settings"] == ["loss.name", "loss.temperature", "optimizer.lr"]
    assert [row["settings"] for row in tree["runs"]] == [
        {"loss.name": "x", "loss.temperature": 0.1, "optimizer.lr": 1},
        {"loss.name": "y", "optimizer.lr": True},
    ]
    (line,) = [line for line in lines if "`loss.temperature`" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["`loss.temperature`", "`0.1`", "`-`"]
    assert any("different losses" in remark for remark in tree["remarks"])


_TREES = st.recursive(
    st.integers(0, 2) | st.none() | st.booleans(),
    lambda trees: st.dictionaries(st.sampled_from("abc"), trees, min_size=1, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), _TREES), min_size=1, max_size=3))
def test_settings_that_do_not_differ_are_equal_in_all_runs(trees: list[dict[str, Any]]) -> None:
    def look_up(tree: Any, name: str) -> str:
        for part in name.split("."):
            if not isinstance(tree, Mapping) or part not in tree:
                return "absent"
            tree = tree[part]
        return "branch" if isinstance(tree, Mapping) else repr(tree)

    flat = [flat_settings(tree) for tree in trees]
    differing = differing_names(flat)
    for name in {name for own in flat for name in own}:
        assert (name in differing) == (len({look_up(tree, name) for tree in trees}) > 1)


def test_names_are_as_long_as_sets_them_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    runs = [make_run(tmp_path / name, recipe=name) for name in ("x/a", "y/a")]
    assert [row.name for row in compare_runs(runs).rows] == ["x/a", "y/a"]
    assert [row.name for row in compare_runs(runs[:1]).rows] == ["a"]


def test_numbers_that_are_hard_to_compare_are_remarked_on(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", validation={"seed": 0, "steps_between": 5}, shards="x")
    second = make_run(tmp_path / "b", recipe="s", validation={"seed": 1, "steps_between": 6}, shards="y")
    for run, fingerprint in ((first, "f"), (second, "g")):
        tree = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**tree, "shards": {"fingerprint": fingerprint}}))
    write_steps(begin_run(tmp_path / "c"), range(3), loss=1.0)
    remarks = report_runs([first, second, tmp_path / "c"])[0]["remarks"]
    assert sum("validation values" in remark for remark in remarks) == 1, "how often one validates changes no value"
    assert any("validation.seed" in remark for remark in remarks)
    assert any("2 different shard sets" in remark for remark in remarks)
    assert any("whole loss is shown: c" in remark for remark in remarks)
