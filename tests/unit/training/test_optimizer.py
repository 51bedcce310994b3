import pytest
import torch

from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from training.optimizer import create_optimizer, freeze_parameters, schedule_factor, set_learning_rate
from training.settings import OptimizerSettings

SETTINGS = OptimizerSettings(lr=0.1, weight_decay=0.5, projection_lr_multiplier=10, warmup_steps=4)
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
    factors = [schedule_factor(step, SETTINGS, num_steps=20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01
    constant = SETTINGS.model_copy(update={"schedule": "constant"})
    assert schedule_factor(19, constant, num_steps=20) == 1.0


def test_freezing_nothing_is_allowed() -> None:
    module = torch.nn.Linear(2, 2)
    freeze_parameters(module, ())
    assert all(parameter.requires_grad for parameter in module.parameters())
