from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Int64
from numpy import ndarray

from data_pipelines.shard_set import ShardSet
from lookalike.encoder import Encoder, create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import DataError, SettingsError, TrainingError
from lookalike.ranking_metrics import class_metrics, measure
from lookalike.settings import validate_settings
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training import validation
from training.selection import Selection
from training.validation import Validator, leave_one_out, pictures_to_validate, split_classes
from training.validation_settings import ValidationSettings

NAMES = [f"class {index}" for index in range(400)]


def make_labels(num_classes: int = 400, seed: int = 0) -> Int64[ndarray, "samples"]:
    """Shuffled labels of classes of 1 to 6 pictures."""
    generator = np.random.default_rng(seed)
    return generator.permutation(np.repeat(np.arange(num_classes), generator.integers(1, 7, num_classes)))


def test_the_split_is_disjoint_in_classes_complete_and_of_about_the_share() -> None:
    labels = make_labels()
    rows = np.flatnonzero(np.arange(len(labels)) % 3 > 0)  # the others are a test split, say
    training, held_out = split_classes(labels, rows, NAMES, share=0.2, seed=0)
    assert sorted([*training, *held_out]) == rows.tolist(), "and no row of another split"
    assert not set(labels[training]) & set(labels[held_out])
    # 400 draws of 0.2: a standard deviation of 8.
    assert abs(len(set(labels[held_out])) - 0.2 * len(set(labels[rows]))) < 30


@given(st.integers(0, 2**31), st.permutations(range(30)), st.integers(2, 29))
def test_where_a_class_belongs_its_name_alone_decides(seed: int, order: list[int], num_kept: int) -> None:
    labels = np.arange(30).repeat(2)
    rows = np.arange(60)
    _, held_out = split_classes(labels, rows, NAMES[:30], share=0.4, seed=seed)
    expected = {NAMES[label] for label in labels[held_out]}
    # Other numbers for the classes, fewer of them, and other pictures.
    names = [NAMES[index] for index in order[:num_kept]]
    labels = np.arange(num_kept).repeat(3)
    _, held_out = split_classes(labels, np.arange(len(labels)), names, share=0.4, seed=seed)
    assert {names[label] for label in labels[held_out]} == expected & set(names)
    _, more = split_classes(labels, np.arange(len(labels)), names, share=0.6, seed=seed)
    assert set(held_out) <= set(more)


def test_another_seed_holds_out_other_classes_and_rows_without_a_class_stay_in_training() -> None:
    labels = np.where(np.arange(400) % 10 == 0, -1, np.arange(400))
    first, second = (split_classes(labels, np.arange(400), NAMES, share=0.3, seed=seed)[1] for seed in (0, 1))
    assert set(first) != set(second)
    assert (labels[first] >= 0).all()
    nobody, no_one = split_classes(np.array([-1, -1]), np.arange(2), [], share=0.9, seed=0)
    assert (len(nobody), len(no_one)) == (2, 0)


def test_at_most_so_many_pictures_are_looked_at_in_whole_classes() -> None:
    labels = make_labels()
    _, held_out = split_classes(labels, np.arange(len(labels)), NAMES, share=0.5, seed=0)
    sizes = Counter(labels[held_out].tolist())
    for limit in (2, 50, 300, 10_000):
        rows = pictures_to_validate(labels, held_out, NAMES, max_pictures=limit, seed=0)
        assert len(rows) == min(limit, len(held_out)) or limit - 6 < len(rows) <= limit
        assert (np.diff(rows) > 0).all()
        assert Counter(labels[rows].tolist()).items() <= sizes.items(), "whole classes"


def random_gallery(num_pictures: int, *, num_values: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of few values, so that similarities are exact in float32 and often equal."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-num_values, num_values + 1, (num_pictures, 5), generator=generator).float()
    labels = torch.randint(0, max(2, num_pictures // 4), (num_pictures,), generator=generator)
    return vectors, labels


def positions_by_sorting(vectors: ndarray, labels: ndarray) -> list[Int64[ndarray, "_"]]:
    """Where the relevant pictures of each query stand; the rows decide between equal similarities."""
    found = []
    for query in range(len(labels)):
        others = [row for row in range(len(labels)) if row != query]
        others.sort(key=lambda row: (-float(vectors[query] @ vectors[row]), row))
        found.append(np.array([place for place, row in enumerate(others) if labels[row] == labels[query]], np.int64))
    return [positions for positions in found if len(positions)]


@pytest.mark.parametrize(("num_values", "num_pictures"), [(0, 40), (1, 60), (2, 151), (50, 200)])
def test_numbers_are_those_of_the_evaluation_also_with_ties(
    monkeypatch: pytest.MonkeyPatch, num_values: int, num_pictures: int
) -> None:
    monkeypatch.setattr(validation, "_BLOCK_ENTRIES", 7 * num_pictures)
    vectors, labels = random_gallery(num_pictures, num_values=num_values, seed=num_values)
    ks = (1, 2, 5, 30)
    measured = leave_one_out(vectors, labels, ks=ks)
    positions = positions_by_sorting(vectors.numpy(), labels.numpy())
    assert measured.pop("num_queries") == len(positions)
    values = measure(class_metrics(ks), positions)
    expected = {f"hit_rate_at_{k}": values[f"hit_rate@{k}"].mean() for k in ks} | {"map_at_r": values["map@r"].mean()}
    # The same values, summed in another order.
    assert measured == pytest.approx(expected, rel=1e-12)


def test_a_k_beyond_all_pictures_takes_all_and_no_pair_is_refused() -> None:
    measured = leave_one_out(torch.eye(3), torch.tensor([0, 1, 0]), ks=(1, 100))
    assert measured == {"hit_rate_at_1": 0.5, "hit_rate_at_100": 1.0, "map_at_r": 0.5, "num_queries": 2}
    with pytest.raises(DataError, match="no class has two pictures"):
        leave_one_out(torch.eye(3), torch.tensor([0, 1, 2]), ks=(1,))


ENCODER = EncoderSettings(backbone="test_resnet", projection_dim=8, drop_rate=0.5, input=InputSettings(size=32))
SETTINGS = ValidationSettings(ks=(1, 3), batch_size=4, steps_between=3)


def make_encoder(**changes: object) -> Encoder:
    torch.manual_seed(0)
    return create_encoder(ENCODER.model_copy(update=changes)).train()


def validate_on_rank(world: World, shards_folder: Path, max_side: int | None) -> dict[str, float]:
    encoder = make_encoder(input=InputSettings(size=32, max_side=max_side))
    with ShardSet.open(shards_folder) as shard_set:
        validator = Validator(shard_set, shard_set.rows("train"), SETTINGS, world=world, num_threads=2)
        measured = validator.validate(encoder)
    del measured["seconds"]
    return measured


@pytest.mark.parametrize("max_side", [None, 40])
def test_the_number_of_ranks_changes_no_bit(shards_folder: Path, max_side: int | None) -> None:
    alone = validate_on_rank(World(), shards_folder, max_side)
    assert alone["num_pictures"] == alone["num_queries"] == 30
    assert alone["value"] == alone["map_at_r"]
    # More ranks than batches at the end of a round.
    assert run_on_ranks(validate_on_rank, 3, shards_folder, max_side) == [alone] * 3


def test_training_does_not_notice(shard_set: ShardSet) -> None:
    """Modes, weights and all random states are as they were, so steps with and without validation are the same."""
    encoder = make_encoder()
    encoder.backbone.conv1.eval()  # a frozen part
    modes = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    np.random.seed(5)  # noqa: NPY002 - the global state is what must not move
    # Not Python's own generator: the checker of annotations draws from it.
    random_states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    validator = Validator(shard_set, shard_set.rows("train"), SETTINGS)
    first, second = validator.validate(encoder), validator.validate(encoder)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert np.random.get_state()[1].tolist() == random_states[1]  # noqa: NPY002
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())


def test_validation_happens_at_every_interval_and_at_the_end(shard_set: ShardSet) -> None:
    validator = Validator(shard_set, shard_set.rows("train"), SETTINGS)
    assert [step for step in range(1, 11) if validator.is_due(step, num_steps=10)] == [3, 6, 9, 10]


def test_held_out_classes_without_a_pair_are_refused_by_the_names_of_the_settings(shard_set: ShardSet) -> None:
    with pytest.raises(SettingsError, match=r"0 pictures are held out.*Raise validation\.class_share"):
        Validator(shard_set, np.empty(0, np.int64), SETTINGS)
    rows = shard_set.rows("train")
    with pytest.raises(SettingsError, match=rf"{len(rows)} pictures are held out, \d of them .* no two of one class"):
        Validator(shard_set, rows, SETTINGS.model_copy(update={"max_pictures": 4}))


def test_embeddings_that_are_not_finite_are_an_error(shard_set: ShardSet) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.projection[1].bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        Validator(shard_set, shard_set.rows("train"), SETTINGS).validate(encoder)


def test_an_undecodable_picture_is_named(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ShardSet.read_bytes
    bad = int(shard_set.rows("train")[7])
    monkeypatch.setattr(ShardSet, "read_bytes", lambda self, row: b"none" if row == bad else read(self, row))
    with pytest.raises(DataError, match=rf"sample '{shard_set.key(bad)}' \(row {bad} of"):
        Validator(shard_set, shard_set.rows("train"), SETTINGS, num_threads=3).validate(make_encoder())


def test_the_best_is_the_first_of_equal_ones_and_patience_counts_since_then() -> None:
    selection = Selection(patience=2)
    assert [selection.observe(step, value) for step, value in ((1, 0.0), (2, 0.5), (3, 0.5))] == [True, True, False]
    assert (selection.best_step, selection.best_value, selection.is_over) == (2, 0.5, False)
    resumed = Selection(patience=2)
    resumed.load_state_dict(selection.state_dict())
    for own in (selection, resumed):
        assert not own.observe(4, 0.4)
        assert own.is_over
    assert selection.observe(5, 0.6)
    assert not selection.is_over
    patient = Selection()
    assert not any(patient.observe(step, 0.0) for step in range(2, 99)) or patient.best_step == 2
    assert not patient.is_over


def test_settings_that_choose_by_what_is_not_measured_are_refused() -> None:
    with pytest.raises(SettingsError, match="needs 1 among ks"):
        validate_settings(ValidationSettings, {"chosen_by": "hit_rate_at_1", "ks": [2]}, where="test")
    with pytest.raises(SettingsError, match="class_share"):
        validate_settings(ValidationSettings, {"class_share": 1.0}, where="test")
