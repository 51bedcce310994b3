"""Settings: frozen pydantic models, values from YAML, `key.path=value` overrides from the command line.

Modules that declare settings import neither torch nor faiss, so `--help` and mistakes answer at once.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lookalike.errors import SettingsError


class Settings(BaseModel):
    """Base of every settings model: unknown keys are refused, values never change, each field has a sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(model: type[AnySettings], path: Path, overrides: Sequence[str] = ()) -> AnySettings:
    """Reads YAML at `path`, applies overrides such as `optimizer.lr=1e-4`, and validates against `model`.

    Raises:
        SettingsError: the file is missing or not a mapping, or a value is refused; every refused key is named in full.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise SettingsError(f"Settings file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Settings file {path} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"Settings file {path} holds a {type(tree).__name__}, expected `key: value` lines.")
    where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    return validate_settings(model, apply_overrides(tree, overrides), where=where)


def validate_settings(model: type[AnySettings], tree: dict[str, Any], *, where: str) -> AnySettings:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_refusal(entry["loc"], entry["type"], entry["msg"], model) for entry in error.errors()]
        raise SettingsError(f"Settings refused ({where}):\n  " + "\n  ".join(lines)) from None


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `tree` in which each `key.path=value` replaces one value; values are read as YAML."""
    merged = _copy(tree)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not all(path.split(".")):
            raise SettingsError(f"Override {override!r} is not of the form key.path=value.")
        *parents, leaf = path.split(".")
        branch = merged
        for key in parents:
            child = branch.setdefault(key, {})
            if not isinstance(child, dict):
                raise SettingsError(f"Override {override!r}: {key!r} holds a value, it has no keys below it.")
            branch = child
        try:
            branch[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"Override {override!r}: the value is not valid YAML: {error}") from error
    return merged


def dump_settings(settings: Settings) -> dict[str, Any]:
    """The resolved tree as plain JSON types: what is written into run folders and manifests."""
    return settings.model_dump(mode="json")


def _refusal(location: tuple[int | str, ...], kind: str, message: str, model: type[Settings]) -> str:
    path = ".".join(str(part) for part in location) or "(top)"
    if kind != "extra_forbidden":
        return f"{path}: {message}"
    near = difflib.get_close_matches(str(location[-1]), sorted(_names_of(model)), n=1)
    return f"{path}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")


def _names_of(model: type[Settings]) -> set[str]:
    """Names of all settings in the tree."""
    schema = model.model_json_schema()
    return {name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", {})}


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}
