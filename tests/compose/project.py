"""One compose project made of compose.yaml: its life, its containers, what they print.

Owns the project's name and settings; never looks into a container but through docker.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.compose.engine import docker
from tests.support.mesh import ROOT

SERVICES = ("gateway", "prefill", "decode-0", "decode-1", "kvstore")
BUILD_TIMEOUT_S = 1800.0
HEALTHY_TIMEOUT_S = 240.0
DOWN_TIMEOUT_S = 120.0
PROFILES = ("gpu", "observability")
# The README's commands that need no other images and no GPU.
UP, SCALE_UP = "docker compose up", "docker compose up --scale kvstore=2"


def compose(*words: str, env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
    """Standard output of docker-compose in the repository's root; AssertionError when it fails.

    .env.example, where everything is commented out, is read for a developer's own .env.
    """
    done = subprocess.run(
        ["docker-compose", "--env-file", ".env.example", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, "COMPOSE_DOCKER_CLI_BUILD": "0", **(env or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class Project:
    """`build`, `up`, use it, `down`. `settings` are variables of compose.yaml."""

    def __init__(self, name: str, settings: Mapping[str, str], *overrides: Path) -> None:
        self.name = name
        self._settings = settings
        files = (ROOT / "compose.yaml", *overrides)
        self._words = ("-p", name, *(word for file in files for word in ("-f", str(file))))

    def compose(self, *words: str, timeout_s: float = 60.0) -> str:
        """docker-compose on this project."""
        return compose(*self._words, *words, env=self._settings, timeout_s=timeout_s)

    def build(self) -> None:
        """Images of all services, from cached layers where nothing changed."""
        self.compose("build", "--quiet", timeout_s=BUILD_TIMEOUT_S)

    def up(self, command: str = UP) -> None:
        """Starts everything as the command does; does not wait for health."""
        up, *words = shlex.split(command)[2:]
        self.compose(up, "--detach", "--no-build", *words, timeout_s=DOWN_TIMEOUT_S)

    def down(self) -> None:
        """Removes containers, networks and volumes."""
        self.compose("down", "--volumes", timeout_s=DOWN_TIMEOUT_S)

    def container(self, service: str) -> str:
        """A service's container id; it may have ended."""
        label = f"label=com.docker.compose.project={self.name}"
        of = f"label=com.docker.compose.service={service}"
        return docker("ps", "--all", "--quiet", "--filter", label, "--filter", of)

    def state(self, service: str) -> dict[str, Any]:
        """Docker's account of a service's container: Pid, ExitCode, Health, RestartCount beside."""
        found = json.loads(docker("inspect", self.container(service)))[0]
        return {**found["State"], "RestartCount": found["RestartCount"]}

    def logs(self, service: str) -> str:
        """What a service printed."""
        return self.compose("logs", "--no-color", service)

    def execute(self, service: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a service's container."""
        command = ["docker", "exec", self.container(service), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def wait_healthy(self, *services: str) -> None:
        """Until docker's own health checks pass; AssertionError shows what was printed."""
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        for service in services or SERVICES:
            while self.state(service)["Health"]["Status"] != "healthy":
                if time.monotonic() > deadline:
                    state = self.state(service)
                    raise AssertionError(f"{service}: {state}\n{self.logs(service)[-4000:]}")
                threading.Event().wait(0.25)
