import json
import shutil
from pathlib import Path

import fsspec
import pytest

from lookalike.encoder import create_encoder, save_encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.errors import ArtifactError, SettingsError
from lookalike.events import read_events
from tests.unit.training.small_runs import CLASSES, VALIDATION, last_weights, settings_for
from training.__main__ import main
from training.checkpoint import save_checkpoint
from training.loop import train
from training.reporting.run_record import read_record
from training.run_folder import describe_run
from training.training_state import begin_or_resume
from training.validation import Validator


def test_training_lowers_the_loss_on_the_pictures_it_sees(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run", num_steps=30, loss={"rank_temperature": 0.1, "ks": [1, 2]})
    folder = train(settings)
    steps = read_events(tmp_path / "run" / "events-rank0.jsonl", "step")
    assert [event["step"] for event in steps] == list(range(30))
    assert sum(e["loss_above_floor"] for e in steps[-4:]) < 0.7 * sum(e["loss_above_floor"] for e in steps[:4])
    assert all(event["loss_above_floor"] > 0 for event in steps)
    assert (folder / "encoder.safetensors").exists()
    assert (tmp_path / "run" / "settings.yaml").read_text().startswith("# Resolved settings")


def test_a_finished_run_is_reused_and_another_one_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run", num_steps=1)
    folder = train(settings)
    before = (folder / "encoder.safetensors").stat().st_mtime_ns
    assert train(settings) == folder
    assert train(settings.model_copy(update={"num_workers": 1, "steps_per_checkpoint": 7})) == folder
    assert (folder / "encoder.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match=r"finished run with other settings: seed 0 \(now 1\)\."):
        train(settings.model_copy(update={"seed": 1}))


def test_a_folder_with_another_artifact_is_no_run_folder(shards_folder: Path, tmp_path: Path) -> None:
    save_encoder(create_encoder(EncoderSettings(backbone="resnet10t")), tmp_path / "e" / "encoder")
    with pytest.raises(ArtifactError, match="no training run"):
        train(settings_for(shards_folder, tmp_path / "e"))


def test_an_unfinished_run_with_other_settings_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    state = begin_or_resume(settings, None, classes=CLASSES)
    save_checkpoint(settings.run, state.encoder, state.state_dict(), step=1, identity="an identity", num_kept=2)
    with pytest.raises(ArtifactError, match="other settings or data"):
        train(settings)
    describe_run(settings, "an identity", batch=settings.batch)
    with pytest.raises(ArtifactError, match="other data"):
        train(settings)
    changed = settings_for(shards_folder, tmp_path / "run", optimizer={"lr": 0.5}, num_workers=1)
    with pytest.raises(ArtifactError, match=r"with other settings: optimizer\.lr 0\.\d+ \(now 0\.5\)\."):
        train(changed)


def test_shards_at_an_address_train_the_encoder_of_the_folder(shards_folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{shards_folder}/", "/remote/shards/", recursive=True)
    cache = {"folder": tmp_path / "cache"}
    local = train(settings_for(shards_folder, tmp_path / "local", num_steps=2))
    address = "memory://remote/shards"
    remote = train(settings_for(address, tmp_path / "remote", num_steps=2, shard_cache=cache))
    assert (remote / "encoder.safetensors").read_bytes() == (local / "encoder.safetensors").read_bytes()
    with pytest.raises(SettingsError, match=r"shard_cache\.folder"):
        settings_for(address, tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": -1}, "seed"), ({"loss": {"ks": []}}, r"loss\.recall_at_k\.ks"), ({"num_steps": 0}, "num_steps")],
)
def test_impossible_settings_are_refused_at_once(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings_for(tmp_path, tmp_path, **changes)


def test_every_step_says_whether_it_taught_anything(shards_folder: Path, tmp_path: Path) -> None:
    train(settings_for(shards_folder, tmp_path / "run", tensorboard=True))
    (*_, last) = read_events(tmp_path / "run" / "events-rank0.jsonl", "step")
    shares = [name for name in last if name.startswith(("hit_rate_at_", "recall_at_", "live_", "window_", "ranked_"))]
    assert len(shares) >= 9
    assert all(0 <= last[name] <= 1 for name in shares)
    assert sum(last[name] for name in shares if name.startswith("ranked_")) == pytest.approx(1)
    assert 0 <= last["embedding_spread"] <= 1
    assert (last["rank_temperature"], last["k_temperature"], last["largest_k"]) == (0.01, 1.0, 16)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_looking_at_held_out_classes_changes_no_bit_of_the_weights(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = {"backbone": "resnet10t", "projection_dim": 8, "drop_rate": 0.3, "input": {"size": 32}}
    train(settings_for(shards_folder, tmp_path / "on", validation=VALIDATION, encoder=encoder))
    monkeypatch.setattr("training.loop.create_validator", lambda *arguments: None)
    train(settings_for(shards_folder, tmp_path / "off", validation=VALIDATION, encoder=encoder))
    assert last_weights(tmp_path / "on", 3) == last_weights(tmp_path / "off", 3)
    assert len(read_events(tmp_path / "on" / "events-rank0.jsonl", "validation")) == 3
    assert read_events(tmp_path / "off" / "events-rank0.jsonl", "validation") == []


def test_the_best_checkpoint_becomes_the_encoder_and_patience_ends_the_run(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.8, 0.8, 0.7, 0.9])
    monkeypatch.setattr(Validator, "validate", lambda self, encoder: {"value": next(values)})
    run = tmp_path / "run"
    validation = {**VALIDATION, "patience": 2}
    settings = settings_for(shards_folder, run, num_steps=5, validation=validation, num_kept_checkpoints=1)
    folder = train(settings)
    assert [event["step"] for event in read_events(run / "events-rank0.jsonl", "step")] == [0, 1, 2, 3]
    assert (folder / "encoder.safetensors").read_bytes() == last_weights(run, 2) != last_weights(run, 4)
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == 2
    # Killed before the encoder was written, the run knows that it is over.
    shutil.rmtree(folder)
    assert (train(settings) / "encoder.safetensors").read_bytes() == last_weights(run, 2)
    assert len(read_events(run / "events-rank0.jsonl", "step")) == 4


def test_a_report_reads_the_runs_that_training_wrote(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        train(settings_for(shards_folder, tmp_path / str(seed), seed=seed, validation=VALIDATION), command="a command")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "report"), "--json"])
    assert ended.value.code == 0
    tree = json.loads(capsys.readouterr().out)
    assert [(run["seed"], run["steps"], run["is_finished"]) for run in tree["runs"]] == [(0, 3, True), (1, 3, True)]
    [recipe] = tree["recipes"]
    assert recipe["num_seeds"] == 2, "they differ by their seed alone"
    assert recipe["means"]["best_validation"]["mean"] > 0
    assert (tmp_path / "report" / "report.html").exists()
    records = [read_record(tmp_path / str(seed)) for seed in (0, 1)]
    assert records[0]["recipe"] == records[1]["recipe"]
    assert records[0]["identity"] != records[1]["identity"]
    assert records[0]["starts"][0]["command"] == "a command"
