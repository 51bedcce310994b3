"""The Dockerfile and what Compose starts, without Docker: held against a linter, Compose's schema, and the tree."""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import compose_spec
import pytest
import yaml

from lookalike.settings import load_settings
from serving.settings import ServingSettings

DEPLOY = Path("deploy")
TARGETS = ("serve-cpu", "serve-gpu", "train")


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined."""
    lines = Path("Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    pairs = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(name, arguments.strip()) for name, _, arguments in pairs]


def _stages() -> dict[str, list[tuple[str, str]]]:
    """Name -> its own instructions and, before them, those of the stages that it is made from."""
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for name, arguments in _instructions():
        if name == "FROM":
            base, _, stage = arguments.split()
            current = stages[stage] = list(stages.get(base, []))
        else:
            current.append((name, arguments))
    return stages


def test_the_linter_finds_nothing_at_all() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_the_command_as_a_user_who_is_not_root(target: str) -> None:
    stage = _stages()[target]
    last = dict(stage)
    assert last["USER"] == "10001"
    assert yaml.safe_load(last["ENTRYPOINT"]) == ["lookalike"]
    assert any(f"--uid {last['USER']}" in arguments for name, arguments in stage if name == "RUN")
    assert f"--from=build-{target} /opt/lookalike /opt/lookalike" in [a for n, a in stage if n == "COPY"]
    # What built it stays behind.
    assert not any("pip" in arguments for name, arguments in stage if name == "RUN")


@pytest.mark.parametrize("target", TARGETS)
def test_the_extras_of_an_image_exist(target: str) -> None:
    known = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (install,) = [a for n, a in _stages()[f"build-{target}"] if n == "RUN" and "install" in a]
    extras = install.split("[")[1].split("]")[0].split(",")
    assert set(extras) <= known.keys()
    assert ("gpu" in extras) is not ("cpu" in extras)  # two builds of one module


@pytest.mark.parametrize("target", ["serve-cpu", "serve-gpu"])
def test_an_image_that_serves_tells_its_health_and_has_valid_settings(target: str) -> None:
    last = dict(_stages()[target])
    assert "/readyz" in last["HEALTHCHECK"]
    settings = load_settings(ServingSettings, DEPLOY / "serve.yaml")
    assert last["EXPOSE"] == str(settings.port)
    assert f"127.0.0.1:{settings.port}/" in last["HEALTHCHECK"]
    assert settings.host == "0.0.0.0"  # so that it is reached from outside of its container, by those who have keys
    assert settings.keys is not None
    copied = [a.split()[1] for n, a in _stages()[target] if n == "COPY" and a.startswith("deploy/serve.yaml")]
    assert yaml.safe_load(last["CMD"]) == ["serve", "--settings", *copied]


def test_the_default_target_serves_on_cpus() -> None:
    assert list(_stages())[-1] == "serve-cpu"


def test_all_that_is_copied_exists_and_is_let_through() -> None:
    sent = [
        line.removeprefix("!")
        for line in Path(".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    for name, arguments in _instructions():
        if name == "COPY" and "--from" not in arguments:
            for source in shlex.split(arguments)[:-1]:
                assert Path(source).exists(), source
                assert any(fnmatch.fnmatch(source, pattern) for pattern in sent), f".dockerignore keeps {source} out"
    assert all(Path(pattern).exists() for pattern in sent)


def test_all_packages_are_in_the_image() -> None:
    included = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {name for name in included["find"]["include"] if not name.endswith(".*")}
    copied = {a.split()[0] for n, a in _stages()["build"] if n == "COPY"}
    assert packages <= copied


class TestCompose:
    @pytest.fixture
    def text(self) -> str:
        """With variables replaced, as Compose does before it looks at the rest: by their default, or a folder."""
        text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        return re.sub(r"\$\{\w+:\?[^}]*\}", "/srv/index", text)

    def test_the_file_fits_the_specification(self, text: str) -> None:
        compose = compose_spec.PyCompose.from_yaml(text)
        compose.validate()
        assert compose.to_spec().services is not None

    def test_the_specification_would_find_a_mistake(self, text: str) -> None:
        with pytest.raises(ValueError, match="imagee"):
            compose_spec.PyCompose.from_yaml(text.replace("image: prom", "imagee: prom"))

    def test_what_is_built_and_mounted_exists(self, text: str) -> None:
        services = yaml.safe_load(text)["services"]
        server = services["lookalike"]
        assert (DEPLOY / server["build"]["context"]).resolve() == Path.cwd()
        assert server["build"]["target"] in TARGETS
        mounted = [volume for service in services.values() for volume in service["volumes"]]
        for volume in mounted:
            # Keys are made by whoever runs it; the page on operation says how.
            if volume.startswith("./") and not volume.startswith(("./keys:", "./metrics_key:")):
                assert (DEPLOY / volume.split(":")[0]).exists(), volume

    def test_the_server_is_reached_from_this_machine_alone_and_may_do_little(self, text: str) -> None:
        services = yaml.safe_load(text)["services"]
        for service in services.values():
            assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        server = services["lookalike"]
        assert server["read_only"]
        assert server["cap_drop"] == ["ALL"]
        assert server["security_opt"] == ["no-new-privileges:true"]

    def test_paths_in_the_container_are_those_of_the_settings(self, text: str) -> None:
        volumes = yaml.safe_load(text)["services"]["lookalike"]["volumes"]
        settings = load_settings(ServingSettings, DEPLOY / "serve.yaml")
        targets = [volume.removesuffix(":ro").rpartition(":")[2] for volume in volumes]
        assert str(settings.index) in targets
        assert settings.keys is not None
        assert str(settings.keys.parent) in targets
