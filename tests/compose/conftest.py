"""A mesh of containers, made of compose.yaml as it is, for the tests that use it up in order."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import NoEngineError
from tests.compose.images import built_images
from tests.compose.project import Project
from tests.support.mesh import free_port

UCX = Path(__file__).with_name("ucx.yaml")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Images of every service of the default profile; gives the settings to run them with."""
    try:
        with built_images(tmp_path_factory.mktemp("packages")) as settings:
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
