import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import PositiveInt

from lookalike.errors import SettingsError
from lookalike.settings import Settings, apply_overrides, dump_settings, load_settings, validate_settings


class Inner(Settings):
    size: PositiveInt = 3


class Outer(Settings):
    path: Path
    rate: float = 0.1
    inner: Inner = Inner()


def test_yaml_and_overrides_give_the_resolved_tree(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("path: a/b\nrate: 1e-3\n")
    settings = load_settings(Outer, file, ["inner.size=7"])
    assert settings == Outer(path=Path("a/b"), rate=0.001, inner=Inner(size=7))
    assert dump_settings(settings) == {"path": "a/b", "rate": 0.001, "inner": {"size": 7}}


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"path": "x", "inner": {"sizes": 1}}, r"inner\.sizes: there is no such setting; did you mean size\?"),
        ({"path": "x", "inner": {"size": 0}}, r"inner\.size: "),
        ({}, "path"),
    ],
)
def test_a_refused_key_is_named_in_full(tree: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        validate_settings(Outer, tree, where="test")


@pytest.mark.parametrize("override", ["size", "=3", "inner..size=3", "path.deeper=1", "inner.size=[1"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(SettingsError, match="Override"):
        apply_overrides({"path": "x", "inner": {"size": 1}}, [override])


def test_overrides_leave_the_given_tree_alone() -> None:
    tree = {"inner": {"size": 1}}
    assert apply_overrides(tree, ["inner.size=2", "new.key=true"]) == {"inner": {"size": 2}, "new": {"key": True}}
    assert tree == {"inner": {"size": 1}}


@pytest.mark.parametrize("content", [None, "- a\n", "a: [", b"\xff\xfe"])
def test_an_unusable_file_is_a_settings_error(tmp_path: Path, content: str | bytes | None) -> None:
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load_settings(Outer, file)


SETTINGS_MODULES = [
    "lookalike.settings",
    "lookalike.encoder_settings",
    "data_pipelines.settings",
    "training.settings",
    "indexing.settings",
    "serving.settings",
    "training.__main__",
    "data_pipelines.__main__",
    "indexing.__main__",
    "evaluation.__main__",
    "serving.__main__",
    "demo.__main__",
]


def test_settings_and_commands_import_neither_torch_nor_faiss() -> None:
    program = (
        f"import sys, importlib; [importlib.import_module(m) for m in {SETTINGS_MODULES!r}];"
        "print(sorted({'torch', 'faiss', 'torchvision', 'timm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
