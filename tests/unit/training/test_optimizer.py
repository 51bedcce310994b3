from typing import Any

import pytest
import torch

from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from training.optimizer import create_optimizer, freeze_parameters, schedule_factor, set_learning_rate
from training.optimizer_settings import AdamSettings, AdamWSettings, SGDSettings

SETTINGS = AdamWSettings(lr=0.1, weight_decay=0.5, projection_lr_multiplier=10, warmup_steps=4)
ENCODER = EncoderSettings(backbone="resnet10t", pooling="gem", projection_dim=8, input=InputSettings(size=32))


def test_decay_spares_norms_biases_and_the_power_and_the_head_has_its_own_rate() -> None:
    encoder = create_encoder(ENCODER)
    optimizer = create_optimizer(encoder, SETTINGS)
    set_learning_rate(optimizer, 0.5)
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0.0), name
            assert group["lr"] == pytest.approx(0.05 if name.startswith("backbone.") else 0.5), name
    assert seen == set(names.values())
    assert "pool.power" in seen


def test_frozen_parameters_are_not_trained_and_typos_are_refused() -> None:
    encoder = create_encoder(ENCODER)
    freeze_parameters(encoder, ("backbone.conv1", "backbone.layer1."))
    optimizer = create_optimizer(encoder, SETTINGS)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in encoder.named_parameters():
        is_frozen = name.startswith(("backbone.conv1", "backbone.layer1."))
        assert (parameter in trained) is not is_frozen, name
    with pytest.raises(ValueError, match=r"backbone\.layr1"):
        freeze_parameters(encoder, ("backbone.layr1",))


def test_the_rate_warms_up_peaks_and_ends_near_zero() -> None:
    factors = [schedule_factor(step, SETTINGS, num_steps=20, num_steps_per_epoch=5) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01
    constant = SETTINGS.model_copy(update={"schedule": "constant"})
    assert schedule_factor(19, constant, num_steps=20, num_steps_per_epoch=5) == 1.0


def test_freezing_nothing_is_allowed() -> None:
    module = torch.nn.Linear(2, 2)
    freeze_parameters(module, ())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_pooling_and_what_a_loss_learns_have_their_own_rates() -> None:
    encoder = create_encoder(ENCODER)
    proxies = torch.nn.Parameter(torch.zeros(3, 8))
    settings = SETTINGS.model_copy(update={"pooling_lr_multiplier": 5})
    optimizer = create_optimizer(encoder, settings, loss_parameters=[proxies], loss_lr_multiplier=100.0)
    set_learning_rate(optimizer, 1.0)
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert encoder.pool is not None
    assert group_of[encoder.pool.power]["lr"] == pytest.approx(0.5)
    assert group_of[proxies]["lr"] == pytest.approx(10.0)
    assert group_of[proxies]["weight_decay"] == 0.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)  # the one that events report: of the backbone


def test_decay_of_every_parameter_leaves_none_out() -> None:
    optimizer = create_optimizer(create_encoder(ENCODER), SETTINGS.model_copy(update={"decays_every_parameter": True}))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


def test_the_options_of_both_optimizers_arrive() -> None:
    encoder = create_encoder(ENCODER)
    sgd = create_optimizer(encoder, SGDSettings(lr=0.1, momentum=0.7, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)
    adamw = create_optimizer(encoder, AdamWSettings(lr=0.1, betas=(0.8, 0.99), epsilon=1e-6, keeps_largest_square=True))
    assert isinstance(adamw, torch.optim.AdamW)
    adam = create_optimizer(encoder, AdamSettings(name="adam", lr=0.1, weight_decay=0.5))
    assert type(adam) is torch.optim.Adam
    assert not adam.defaults["decoupled_weight_decay"]
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["amsgrad"]) == ((0.8, 0.99), 1e-6, True)


def test_a_schedule_by_epochs_moves_between_epochs_only() -> None:
    settings = AdamWSettings(lr=1.0, unit="epoch", warmup_epochs=1)
    factors = [schedule_factor(step, settings, num_steps=20, num_steps_per_epoch=4) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    epochs = [set(factors[start : start + 4]) for start in range(4, 20, 4)]
    assert [len(epoch) for epoch in epochs] == [1, 1, 1, 1]
    by_epoch = [epoch.pop() for epoch in epochs]
    assert by_epoch[0] == 1.0
    assert by_epoch == sorted(by_epoch, reverse=True)
    assert 0 < by_epoch[-1] < 0.2


@pytest.mark.parametrize(("unit", "decay_every"), [("step", 6), ("epoch", 2)])
def test_drops_come_as_often_as_asked(unit: str, decay_every: int) -> None:
    settings = AdamWSettings(lr=1.0, schedule="step", unit=unit, decay_every=decay_every)  # type: ignore[arg-type]
    factors = [schedule_factor(step, settings, num_steps=18, num_steps_per_epoch=3) for step in range(18)]
    assert factors == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 6)


@pytest.mark.parametrize(("unit", "milestones", "num_warmup_steps"), [("step", (6, 9), 0), ("epoch", (2, 3), 3)])
def test_drops_come_at_milestones_counted_from_the_start_of_the_run(
    unit: str, milestones: tuple[int, ...], num_warmup_steps: int
) -> None:
    """torch's MultiStepLR is the oracle, after the warm-up."""
    settings = AdamWSettings(
        lr=1.0,
        schedule="step",
        unit=unit,  # type: ignore[arg-type]
        milestones=milestones,
        decay_factor=0.3,
        warmup_steps=num_warmup_steps,
    )
    factors = [schedule_factor(step, settings, num_steps=15, num_steps_per_epoch=3) for step in range(15)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 9], gamma=0.3)
    expected = []
    for _ in range(15):
        expected.append(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()
    assert factors[num_warmup_steps:] == pytest.approx(expected[num_warmup_steps:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "one of them"),
        ({"schedule": "step", "decay_every": 3, "milestones": (3,)}, "one of them"),
        ({"schedule": "cosine", "milestones": (3,)}, "no effect with schedule cosine"),
        ({"schedule": "step", "milestones": (5, 3)}, "must ascend"),
    ],
)
def test_drops_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWSettings(lr=1.0, **changes)
