"""A container engine for the tests of compose.yaml: one that answers, or one started here.

Owns the daemon it starts and the base image it makes. Never changes an engine's settings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 60.0
PULL_TIMEOUT_S = 300.0
PACKAGES = "python3,python3-venv,ca-certificates"


class NoEngineError(Exception):
    """Containers cannot run here, and why."""


def docker(*words: str, timeout_s: float = 60.0) -> str:
    """Standard output of a docker command; CalledProcessError carries what it complained of."""
    done = subprocess.run(
        ["docker", *words], capture_output=True, text=True, check=True, timeout=timeout_s
    )
    return done.stdout.strip()


@contextmanager
def running_engine() -> Iterator[None]:
    """An engine that answers while inside. NoEngineError: there is none and none can be started."""
    missing = [name for name in ("docker", "docker-compose") if shutil.which(name) is None]
    if missing:
        raise NoEngineError(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise NoEngineError("not root: the tests kill processes of containers, and may start one")
    if _answers():
        yield
        return
    if shutil.which("dockerd") is None:
        raise NoEngineError("no docker engine answers, and dockerd is not installed")
    with tempfile.TemporaryFile("w+") as output:
        daemon = subprocess.Popen(["dockerd"], stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(daemon)
            yield
        except NoEngineError as error:
            output.seek(0)
            raise NoEngineError(f"{error}: {output.read()[-400:]}") from None
        finally:
            daemon.terminate()
            daemon.wait(START_TIMEOUT_S)


def ensure_base_image(name: str) -> None:
    """Pulls the base image; where no image registry is reached, makes one of Debian's packages.

    NoEngineError: neither works.
    """
    if docker("images", "--quiet", name):
        return
    try:
        docker("pull", "--quiet", name, timeout_s=PULL_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        _bootstrap(name)


def _bootstrap(name: str) -> None:
    if shutil.which("debootstrap") is None:
        raise NoEngineError(f"{name} cannot be pulled, and debootstrap is not installed")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise NoEngineError(f"debootstrap ended with {done.returncode}: {done.stdout[-400:]}")
        tar = ["tar", "--directory", str(root), "--exclude=./var/cache/apt/*", "--create", "."]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as pack:
            command = ["docker", "import", "-", name]
            subprocess.run(command, stdin=pack.stdout, check=True, capture_output=True)


def _answers() -> bool:
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def _wait(daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers():
        if daemon.poll() is not None:
            raise NoEngineError(f"dockerd ended with {daemon.returncode}")
        if time.monotonic() > deadline:
            raise NoEngineError(f"dockerd did not answer within {START_TIMEOUT_S:g} s")
        threading.Event().wait(0.2)
