"""A package mirror for image builds: what this machine's pip finds, served over HTTP.

Owns the folder of wheels and the server. Builds then need no network of their own, and prove that
compose.yaml works behind a mirror.
"""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mesh import ROOT

# Fixed: the address is a build argument, and another one would build everything anew.
PORT = 50099
BUILD_TOOLS = ("setuptools>=77", "wheel")
METADATA = ("pyproject.toml", "LICENSE", "README.md", "requirements-nixl.txt")


@contextmanager
def package_mirror(host: str, folder: Path) -> Iterator[str]:
    """The address of an index of all that the images install; `folder` is filled for it."""
    _fill(folder)
    handler = functools.partial(_Quiet, directory=str(folder / "index"))
    with http.server.ThreadingHTTPServer((host, PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{host}:{PORT}/"
        finally:
            server.shutdown()


def _fill(folder: Path) -> None:
    """Downloads wheels into `folder`/wheels and lists them by project in `folder`/index."""
    project, wheels, index = (folder / name for name in ("project", "wheels", "index"))
    project.mkdir(parents=True)
    for name in METADATA:
        shutil.copy(ROOT / name, project)
    _download(wheels, f"{project}[gateway,stubs,worker]", *BUILD_TOOLS)
    _download(wheels, "--no-deps", "-r", str(project / "requirements-nixl.txt"))
    for wheel in wheels.iterdir():
        name = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        (index / name).mkdir(parents=True, exist_ok=True)
        wheel.rename(index / name / wheel.name)


def _download(wheels: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), *words]
    subprocess.run(command, check=True, capture_output=True, text=True)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        pass
