"""What `kubectl apply --kustomize deploy/kubernetes` would be sent, held against Kubernetes' own schemas."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lookalike.settings import validate_settings
from serving.observability.metrics import ServingMetrics
from serving.settings import ServingSettings

DEPLOY = Path("deploy")
FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
APPLIED = [FOLDER / name for name in KUSTOMIZATION["resources"]]
# Nobody's cluster is older; `preStop.sleep` is the newest thing used.
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()


def _documents(*paths: Path) -> list[dict[str, Any]]:
    return [document for path in paths for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def _named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in _documents(*APPLIED) if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


PODS = [
    _named("Deployment", "lookalike")["spec"]["template"],
    _named("StatefulSet", "lookalike-writer")["spec"]["template"],
    *_documents(FOLDER / "loading" / "loader.yaml"),
]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_fits_its_schema(version: str) -> None:
    for document in _documents(*APPLIED, FOLDER / "loading" / "loader.yaml"):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_would_find_a_mistake() -> None:
    deployment = _named("Deployment", "lookalike")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


def test_no_manifest_is_forgotten() -> None:
    assert set(FOLDER.glob("*.yaml")) == {*APPLIED, FOLDER / "kustomization.yaml"}


@pytest.mark.parametrize("pod", PODS, ids=["reader", "writer", "loader"])
def test_pods_keep_the_restricted_standard(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001  # as in the Dockerfile
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"] + spec.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("pod", PODS, ids=["reader", "writer", "loader"])
def test_what_is_mounted_exists(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    claimed = {"index"} if pod["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "writer" else set()
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in spec["containers"] + spec.get("initContainers", []):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys() | claimed
    for volume in volumes.values():
        if (claim := volume.get("persistentVolumeClaim")) is not None:
            _named("PersistentVolumeClaim", claim["claimName"])
        if (config := volume.get("configMap")) is not None:
            _named("ConfigMap", config["name"])


def test_settings_are_those_of_the_image_and_are_valid() -> None:
    settings = yaml.safe_load(_named("ConfigMap", "lookalike-settings")["data"]["serve.yaml"])
    assert settings == yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
    resolved = validate_settings(ServingSettings, settings, where="deploy/serve.yaml")
    for pod in PODS[:2]:
        (server,) = pod["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in server["volumeMounts"]]
        assert any(resolved.index.is_relative_to(mount) for mount in mounts)
        assert any(resolved.keys is not None and resolved.keys.is_relative_to(mount) for mount in mounts)
        assert {"name": "http", "containerPort": resolved.port} in server["ports"]


def test_readers_cannot_write_and_only_the_writer_is_one_of_a_kind() -> None:
    reader, writer = _named("Deployment", "lookalike"), _named("StatefulSet", "lookalike-writer")
    (index,) = [v for v in reader["spec"]["template"]["spec"]["volumes"] if v["name"] == "index"]
    assert index["persistentVolumeClaim"]["readOnly"]
    assert writer["spec"]["replicas"] == 1
    # SQLite's locks and shared memory hold within one node.
    assert writer["spec"]["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_selectors_find_the_pods_they_are_for() -> None:
    def finds(selector: dict[str, str], pod: dict[str, Any]) -> bool:
        return selector.items() <= pod["metadata"]["labels"].items()

    reader, writer = PODS[:2]
    for name, mine, other in (("lookalike", reader, writer), ("lookalike-writer", writer, reader)):
        selector = _named("Service", name)["spec"]["selector"]
        assert finds(selector, mine)
        assert not finds(selector, other)
    budget = _named("PodDisruptionBudget", "lookalike")["spec"]["selector"]["matchLabels"]
    assert finds(budget, reader)
    assert not finds(budget, writer)
    (monitor,) = _documents(FOLDER / "monitoring" / "pod_monitor.yaml")
    for selector in (
        _named("NetworkPolicy", "lookalike")["spec"]["podSelector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
    ):
        assert finds(selector, reader)
        assert finds(selector, writer)


def test_autoscaling_goes_by_a_metric_that_the_adapter_makes_of_one_that_exists() -> None:
    scaler = _named("HorizontalPodAutoscaler", "lookalike")["spec"]
    assert scaler["scaleTargetRef"]["name"] == _named("Deployment", "lookalike")["metadata"]["name"]
    assert "replicas" not in _named("Deployment", "lookalike")["spec"]  # each apply would reset it
    (asked,) = [metric["pods"]["metric"]["name"] for metric in scaler["metrics"] if metric["type"] == "Pods"]
    (rule,) = _documents(FOLDER / "monitoring" / "prometheus_adapter_values.yaml")[0]["rules"]["custom"]
    assert rule["name"]["as"] == asked
    assert rule["seriesQuery"].partition("{")[0] in {family.name for family in ServingMetrics().registry.collect()}


def test_requests_end_before_a_pod_is_killed() -> None:
    for template in PODS[:2]:
        spec = template["spec"]
        (server,) = spec["containers"]
        waits = server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        # The server itself takes up to ten seconds for requests that are running, and a little to close.
        assert spec["terminationGracePeriodSeconds"] >= waits + 20
        probes = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
        assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
