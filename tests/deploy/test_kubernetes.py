"""deploy/kubernetes: assembled by kustomize, held against Kubernetes' schemas and each other."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mesh.service_settings import ServiceSettings
from services.gateway.settings import GatewaySettings
from services.kvstore.settings import KvStoreSettings
from services.worker_settings import WorkerSettings
from tests.support.mesh import ROOT

FOLDERS = ("base", "overlays/example")
VERSIONS = ("1.29", "1.37")  # grpc probes and all else here are stable from the first to the last
KUBECTL = Path(sys.executable).with_name("kubectl")
SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "kvstore": KvStoreSettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}
MOVERS = ("prefill", "decode", "kvstore")

Resource = dict[str, Any]
pytestmark = pytest.mark.parametrize("folder", FOLDERS)


@functools.cache
def assembled(folder: str) -> tuple[Resource, ...]:
    """What would be applied."""
    command = [KUBECTL, "kustomize", str(ROOT / "deploy" / "kubernetes" / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def find(folder: str, kind: str, name: str) -> Resource:
    (found,) = (r for r in assembled(folder) if (r["kind"], r["metadata"]["name"]) == (kind, name))
    return found


def of_kind(folder: str, kind: str) -> list[Resource]:
    return [resource for resource in assembled(folder) if resource["kind"] == kind]


def workload(folder: str, role: str) -> Resource:
    return find(folder, "Deployment" if role == "gateway" else "StatefulSet", role)


def container(folder: str, role: str) -> Resource:
    (found,) = workload(folder, role)["spec"]["template"]["spec"]["containers"]
    return found


def variables(folder: str) -> dict[str, str]:
    """The ConfigMap that every service reads, whatever the hash in its name."""
    (found,) = of_kind(folder, "ConfigMap")
    return found["data"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_keeps_its_schema(folder: str, version: str) -> None:
    for resource in assembled(folder):
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_schema_check_sees_an_unknown_field(folder: str) -> None:
    resource = {**find(folder, "PodDisruptionBudget", "decode")}
    resource["spec"] = {**resource["spec"], "maxUnavailible": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("role", SETTINGS)
def test_variables_are_read_by_a_service(folder: str, role: str) -> None:
    """Those of its own by the service itself, the shared ones by any."""

    def known(settings: type[ServiceSettings]) -> set[str]:
        fields = dataclasses.fields(settings)
        return {field.metadata["env"] or f"KVMESH_{field.name.upper()}" for field in fields}

    own = {variable["name"] for variable in container(folder, role).get("env", ())}
    assert own <= known(SETTINGS[role])
    assert set(variables(folder)) <= set().union(*map(known, SETTINGS.values()))
    (source,) = container(folder, role)["envFrom"]
    assert source["configMapRef"]["name"] == of_kind(folder, "ConfigMap")[0]["metadata"]["name"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_gateway_is_told_of_every_replica(folder: str, role: str) -> None:
    num = workload(folder, role)["spec"]["replicas"]
    service = workload(folder, role)["spec"]["serviceName"]
    port = find(folder, "Service", service)["spec"]["ports"][0]["port"]
    addresses = [f"{role}-{index}.{service}:{port}" for index in range(num)]
    assert variables(folder)[f"KVMESH_{role.upper()}"] == ",".join(addresses)


@pytest.mark.parametrize("role", SETTINGS)
def test_a_pod_is_selected_by_its_service_and_its_budget(folder: str, role: str) -> None:
    labels = workload(folder, role)["spec"]["template"]["metadata"]["labels"].items()
    assert find(folder, "Service", role)["spec"]["selector"].items() <= labels
    budget = find(folder, "PodDisruptionBudget", role)["spec"]["selector"]["matchLabels"]
    assert budget.items() <= labels
    assert workload(folder, role)["spec"]["selector"]["matchLabels"].items() <= labels


@pytest.mark.parametrize("role", SETTINGS)
def test_a_pod_is_confined(folder: str, role: str) -> None:
    pod = workload(folder, role)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["automountServiceAccountToken"] is False
    security = container(folder, role)["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("role", SETTINGS)
def test_a_pod_is_probed_by_grpc_health(folder: str, role: str) -> None:
    service = container(folder, role)
    probes = {
        kind: service[f"{kind}Probe"]["grpc"] for kind in ("startup", "liveness", "readiness")
    }
    assert {probe["port"] for probe in probes.values()} == {50051}
    assert probes["readiness"]["service"] == "readiness"
    assert probes["startup"]["service"] == probes["liveness"]["service"] == "liveness"


@pytest.mark.parametrize("role", SETTINGS)
def test_kubernetes_sets_no_variable_of_ours(folder: str, role: str) -> None:
    """A Service called kvmesh would bring KVMESH_PORT=tcp://... into every pod."""
    assert workload(folder, role)["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("role", MOVERS)
def test_a_mover_has_a_gpu_and_may_reach_the_others(folder: str, role: str) -> None:
    assert container(folder, role)["resources"]["limits"]["nvidia.com/gpu"] == 1
    selector = find(folder, "NetworkPolicy", "movers")["spec"]["podSelector"]["matchLabels"]
    template = workload(folder, role)["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= template.items()


def test_everything_is_closed_but_what_a_policy_opens(folder: str) -> None:
    policy = find(folder, "NetworkPolicy", "mesh")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for role in SETTINGS:
        labels = workload(folder, role)["spec"]["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    ports = [rule["ports"] for rule in find(folder, "NetworkPolicy", "gateway")["spec"]["ingress"]]
    assert ports == [[{"port": 50051}]]


def test_the_autoscaler_scales_the_gateway(folder: str) -> None:
    scaler = find(folder, "HorizontalPodAutoscaler", "gateway")["spec"]
    target = find(folder, scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"])
    assert "replicas" not in target["spec"]  # or each apply would undo what the autoscaler did
    assert "cpu" in container(folder, "gateway")["resources"]["requests"]
    assert (
        scaler["minReplicas"]
        > find(folder, "PodDisruptionBudget", "gateway")["spec"]["minAvailable"]
    )


def test_images_are_those_that_compose_builds(folder: str) -> None:
    compose = set(re.findall(r"(kvmesh/[\w-]+):\$", (ROOT / "compose.yaml").read_text()))
    for role in SETTINGS:
        image = container(folder, role)["image"].removeprefix("registry.example.com/")
        assert image.partition(":")[0] in compose
