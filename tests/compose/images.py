"""The images of compose.yaml's default profile, built on an engine that runs while they are used.

Owns what they are built with: the pinned base image and a mirror of this machine's packages.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.compose.engine import docker, ensure_base_image, running_engine
from tests.compose.packages import package_mirror
from tests.compose.project import Project
from tests.support.mesh import ROOT

_DOCKERFILE = (ROOT / "deploy" / "docker" / "kvstore.Dockerfile").read_text()
(BASE,) = re.findall(r"^ARG BASE=(\S+)$", _DOCKERFILE, re.M)


@contextmanager
def built_images(folder: Path) -> Iterator[dict[str, str]]:
    """The settings to run them with; `folder` is filled with packages. NoEngineError: why not."""
    with running_engine():
        ensure_base_image(BASE)
        host = _bridge_address()
        with package_mirror(host, folder) as mirror:
            settings = {
                "PIP_INDEX_URL": mirror,
                "PIP_TRUSTED_HOST": host,
                "KVMESH_TAG": "test",
                "KVMESH_STORE_BYTES": "64MiB",
                "KVMESH_KV_BYTES": "64MiB",
            }
            Project("kvmesh-build", settings).build()
        yield settings


def _bridge_address() -> str:
    """This machine's address on docker's default network, where builds run."""
    subnet = docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
    return str(ipaddress.ip_network(subnet)[1])
