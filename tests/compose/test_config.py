"""compose.yaml says what it should: every profile, one builder an image, confined, explained."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.service_settings import ServiceSettings
from services.gateway.settings import GatewaySettings
from services.kvstore.settings import KvStoreSettings
from services.worker_settings import WorkerSettings
from tests.compose.project import PROFILES, SCALE_UP, UP, compose
from tests.support.mesh import ROOT
from tests.support.readme import commands

TEXT = (ROOT / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
OURS = {name: service for name, service in SERVICES.items() if "kvmesh/" in service["image"]}
MOVERS = [name for name in OURS if name.endswith(("prefill", "kvstore")) or "decode" in name]
SETS = [*chain.from_iterable(combinations(PROFILES, n) for n in range(len(PROFILES) + 1))]
EXAMPLE = (ROOT / ".env.example").read_text()
SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "kvstore": KvStoreSettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}


def role(service: str) -> str:
    return next(name for name in SETTINGS if name in service)


def variables(settings: type[ServiceSettings]) -> Iterator[str]:
    """The variables that a service reads."""
    for field in dataclasses.fields(settings):
        yield field.metadata["env"] or f"KVMESH_{field.name.upper()}"


def comes_after(service: str, other: str) -> bool:
    wanted = SERVICES[service].get("depends_on", [])
    return other in wanted or any(comes_after(name, other) for name in wanted)


@pytest.mark.parametrize("profiles", SETS, ids=lambda profiles: "+".join(profiles) or "default")
def test_compose_takes_every_profile(profiles: tuple[str, ...]) -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("COMPOSE FILE NOT CHECKED: docker-compose is not installed")
    words = [word for profile in profiles for word in ("--profile", profile)]
    config = yaml.safe_load(compose(*words, "config"))
    # 1.29 shows all services with `config`; what a profile starts is told by the file itself.
    for name, service in SERVICES.items():
        if set(service.get("profiles", profiles)) <= set(profiles):
            assert name in config["services"]
    assert "${" not in yaml.safe_dump(config)


@pytest.mark.parametrize("command", commands("docker"))
def test_a_command_of_the_readme_is_run_or_names_what_is_there(command: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", choices=PROFILES)
    parser.add_argument("up", choices=["up"])
    parser.add_argument("service", nargs="?", choices=SERVICES)
    parser.add_argument("--scale")
    given = parser.parse_args(shlex.split(command)[2:])
    profiles = {given.profile} - {None}
    assert profiles or command in (UP, SCALE_UP)  # which test_mesh.py runs
    if given.service:
        assert set(SERVICES[given.service].get("profiles", profiles)) == profiles
    else:
        assert "gpu" not in profiles, "without names the CPU mesh would come up, too"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_needs_no_profile_but_its_own(service: str) -> None:
    profiles = set(SERVICES[service].get("profiles", ()))
    for name in SERVICES[service].get("depends_on", ()):
        assert set(SERVICES[name].get("profiles", ())) <= profiles


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_is_pinned(service: str) -> None:
    image = SERVICES[service]["image"]
    assert re.search(r":(v?\d+\.\d+\.\d+|\$\{KVMESH_TAG:-local\})$", image), image


@pytest.mark.parametrize("service", OURS)
def test_an_image_is_built_once_and_before_it_is_used(service: str) -> None:
    """Compose v2 builds at once: two services that build one tag fail there."""
    image = SERVICES[service]["image"]
    builders = [n for n, other in OURS.items() if other["image"] == image and "build" in other]
    assert len(builders) == 1
    assert builders == [service] or comes_after(service, builders[0])


@pytest.mark.parametrize("service", OURS)
def test_a_container_is_confined(service: str) -> None:
    config = SERVICES[service]
    assert config["read_only"] is True
    assert config["cap_drop"] == ["ALL"]
    assert config["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in config and "privileged" not in config
    assert all(
        volume.endswith((":ro", "/var/cache/kvmesh")) for volume in config.get("volumes", ())
    )


@pytest.mark.parametrize("service", MOVERS)
def test_movers_can_share_memory(service: str) -> None:
    """Each of these is needed for CMA; that they suffice is asserted in a running mesh."""
    config = SERVICES[service]
    assert config["pid"] == config["ipc"] == "service:namespace"
    assert config["cap_add"] == ["SYS_PTRACE"]
    assert SERVICES["namespace"]["ipc"] == "shareable"


@pytest.mark.parametrize("service", [name for name in OURS if name != "namespace"])
def test_a_container_sets_variables_that_its_service_reads(service: str) -> None:
    known = {*variables(SETTINGS[role(service)]), "CUDA_VISIBLE_DEVICES"}
    assert not set(SERVICES[service]["environment"]) - known


def test_every_variable_is_explained() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    explained = set(re.findall(r"^#?([A-Z]\w+)=", EXAMPLE, re.M))
    assert used == explained


@pytest.mark.parametrize("service", [name for name in OURS if "build" in OURS[name]])
def test_a_dockerfile_serves_the_image(service: str) -> None:
    build = SERVICES[service]["build"]
    text = (ROOT / build["dockerfile"]).read_text()
    arguments = set(re.findall(r"^ARG (\w+)=", text, re.M))
    assert arguments == set(build["args"])
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.M)
    assert build.get("target", stages[-1]) in stages
    assert re.findall(r"^USER (\S+)$", text, re.M)[-1] == "10001:10001"
    assert 'CMD ["kvmesh", "health"]' in text


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_is_there(service: str) -> None:
    sources = [volume.split(":")[0] for volume in SERVICES[service].get("volumes", ())]
    assert all((ROOT / Path(s)).exists() for s in sources if s.startswith("./"))
