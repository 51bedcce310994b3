import sys
from types import ModuleType

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from lookalike.encoder import create_encoder, embed_pixels
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import ResourceError, SettingsError
from lookalike.world import World
from training.backend_settings import BackendSettings, DDPBackend, DeepSpeedBackend, FSDP2Backend, SingleBackend
from training.backends.deepspeed import load_deepspeed
from training.backends.protocol import (
    create_backend,
    full_encoder,
    require_only_encoder,
    require_supported,
)

TWO = World(rank=0, size=2)
FSDP2 = FSDP2Backend(name="fsdp2")
ZERO = {stage: DeepSpeedBackend(name="deepspeed", zero_stage=stage) for stage in (1, 2, 3)}
DDP = DDPBackend(name="ddp")


@pytest.mark.parametrize("settings", [DDP, FSDP2, *ZERO.values()])
def test_one_process_needs_no_back_end_for_several(settings: BackendSettings) -> None:
    with pytest.raises(SettingsError, match=r"found 1\. Start it with lookalike launch, or set"):
        require_supported(settings, world=World())
    require_supported(settings, world=TWO)


@pytest.mark.parametrize("settings", [FSDP2, *ZERO.values()])
@pytest.mark.parametrize(
    ("option", "message"), [("loss_learns", "parameters of its own"), ("compiles_backbone", "compiles_backbone")]
)
def test_back_ends_that_spread_the_optimizer_refuse_what_they_cannot_do(
    settings: BackendSettings, option: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        require_supported(settings, world=TWO, **{option: True})
    require_supported(SingleBackend(), world=TWO, **{option: True})
    require_supported(DDP, world=TWO, **{option: True})


def test_an_average_of_the_weights_needs_them_whole() -> None:
    for settings in (FSDP2, ZERO[3]):
        with pytest.raises(SettingsError, match="average_decay needs them whole"):
            require_supported(settings, world=TWO, keeps_average=True)
    for settings in (SingleBackend(), DDP, ZERO[1], ZERO[2]):
        require_supported(settings, world=TWO, keeps_average=True)


def test_a_setting_without_effect_is_refused() -> None:
    settings = DeepSpeedBackend(name="deepspeed", zero_stage=2, largest_whole_parameter=10)
    with pytest.raises(SettingsError, match="has an effect with zero_stage 3 alone"):
        require_supported(settings, world=TWO)


def test_settings_name_the_back_end() -> None:
    adapter: TypeAdapter[BackendSettings] = TypeAdapter(BackendSettings)
    assert adapter.validate_python({"name": "deepspeed", "zero_stage": 1}) == ZERO[1]
    with pytest.raises(ValidationError, match="zero_stage"):
        adapter.validate_python({"name": "ddp", "zero_stage": 1})


def test_parameters_of_a_loss_are_found_in_the_optimizer() -> None:
    encoder, proxies = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
    require_only_encoder(encoder, torch.optim.SGD(encoder.parameters()), name="fsdp2")
    with pytest.raises(SettingsError, match="fsdp2 trains the encoder alone"):
        require_only_encoder(encoder, torch.optim.SGD([*encoder.parameters(), proxies]), name="fsdp2")


def test_a_missing_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ResourceError, match=r"extra \[deepspeed\]"):
        load_deepspeed()


def test_an_old_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("deepspeed")
    old.__dict__.update(DeepSpeedEngine=object, __version__="0.15.0")
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(ResourceError, match=r"needs DeepSpeed 0\.19\.8 or newer, found 0\.15\.0"):
        load_deepspeed()


def test_the_full_encoder_is_a_plain_one_with_the_trained_weights() -> None:
    torch.manual_seed(0)
    encoder = create_encoder(EncoderSettings(backbone="resnet10t", projection_dim=8, input=InputSettings(size=32)))
    backend = create_backend(
        SingleBackend(), encoder, lambda trained: torch.optim.SGD(trained.parameters(), lr=0.1), world=World()
    )
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    plain = full_encoder(backend, encoder, world=World())
    assert plain is not None
    assert plain is not encoder
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(embed_pixels(plain, pixels), embed_pixels(encoder, pixels), rtol=0, atol=0)
