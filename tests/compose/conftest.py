"""A mesh of containers, made of compose.yaml as it is, for the tests that use it up in order."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import NoEngineError, docker, ensure_base_image, running_engine
from tests.compose.packages import package_mirror
from tests.compose.project import Project
from tests.support.mesh import ROOT, free_port

UCX = Path(__file__).with_name("ucx.yaml")


def base_image() -> str:
    """The pinned base image that the Dockerfiles name."""
    found = re.search(
        r"^ARG BASE=(\S+)$", (ROOT / "deploy/docker/kvstore.Dockerfile").read_text(), re.M
    )
    assert found is not None
    return found.group(1)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Images of every service of the default profile; gives the settings they were built with."""
    try:
        with running_engine():
            ensure_base_image(base_image())
            gateway = "{{(index .IPAM.Config 0).Gateway}}"
            host = docker("network", "inspect", "bridge", "--format", gateway)
            with package_mirror(host, tmp_path_factory.mktemp("packages")) as mirror:
                settings = {
                    "PIP_INDEX_URL": mirror,
                    "PIP_TRUSTED_HOST": host,
                    "KVMESH_TAG": "test",
                    "KVMESH_STORE_BYTES": "64MiB",
                    "KVMESH_KV_BYTES": "64MiB",
                }
                Project("kvmesh-build", settings).build()
            yield settings
    except NoEngineError as error:
        pytest.skip(f"CONTAINERS NOT TESTED: {error}")


@pytest.fixture(scope="session")
def ports() -> dict[str, int]:
    """Ports on this machine, by the variable that sets them."""
    return {f"KVMESH_{name}": free_port() for name in ("PORT", "ADMIN_PORT", "HTTP_PORT")}


@pytest.fixture(scope="session")
def project(built: dict[str, str], ports: dict[str, int]) -> Iterator[Project]:
    """The default profile, up and healthy."""
    settings = {**built, **{name: str(port) for name, port in ports.items()}}
    project = Project(f"kvmesh-{uuid.uuid4().hex[:8]}", settings, UCX)
    try:
        project.up()
        project.wait_healthy()
        yield project
    finally:
        project.down()
