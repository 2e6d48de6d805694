"""Prometheus for tests: its programs, and a server that scrapes some targets.

Owns the server's process and folder. The programs are those of the machine or, where apt and its
package sources are, Debian's package unpacked into a folder, for which nobody needs to be root.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.mesh import free_port

JOB = "kvmesh"
FETCH_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Where prometheus and promtool are."""

    prometheus: str
    promtool: str


def find_programs(folder: Path) -> Programs:
    """The machine's, or those unpacked into `folder`; OSError says why there are none."""
    unpacked = folder / "root/usr/bin"
    if shutil.which("prometheus") is None and not (unpacked / "promtool").exists():
        _unpack(folder)
    search = None if shutil.which("prometheus") else str(unpacked)
    found = {name: shutil.which(name, path=search) for name in ("prometheus", "promtool")}
    prometheus, promtool = found["prometheus"], found["promtool"]
    if prometheus is None or promtool is None:
        raise OSError(f"no prometheus or no promtool: {found}; Debian's package has both")
    return Programs(prometheus=prometheus, promtool=promtool)


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        download = Path(name)
        lists, cache = download / "lists", download / "cache"
        for path in (lists / "partial", cache / "archives/partial"):
            path.mkdir(parents=True)
        own = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}")
        _run(download, "apt-get", *own, "update")
        _run(download, "apt-get", *own, "download", "prometheus")
        package = next(download.glob("prometheus_*.deb"))
        _run(download, "dpkg-deb", "-x", str(package), str(folder / "root"))


def _run(folder: Path, *command: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(str(error)) from error
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}")


class Prometheus:
    """A server that scrapes `targets`, host:port each, once a second. End it with `close`."""

    def __init__(self, programs: Programs, folder: Path, targets: list[str], rules: Path) -> None:
        port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": targets}]}],
        }
        path = folder / "prometheus.json"  # which is YAML, too
        path.write_text(json.dumps(config))
        self._log = (folder / "prometheus.log").open("w+")
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        self.started_at = time.time()
        self._popen = subprocess.Popen(
            [
                programs.prometheus,
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer of its HTTP API, once it answers; AssertionError if it refuses."""
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer:
                    return json.load(answer)["data"]
            except urllib.error.HTTPError as error:
                if error.code != 503:  # it starts
                    raise AssertionError(f"{parameters}: {error.read().decode()}") from error
            except OSError as error:
                self._log.seek(0)
                assert self._popen.poll() is None and time.monotonic() < deadline, (
                    f"{error}\n{self._log.read()[-4000:]}"
                )
            threading.Event().wait(0.2)

    def points(self, query: str) -> list[float]:
        """Every value that a query had since the start, a second apart, of all its series."""
        series = self.get(
            "query_range", query=query, start=self.started_at, end=time.time(), step=1
        )["result"]
        return [float(value) for one in series for _, value in one["values"]]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Polls until it is true; fails naming what was awaited."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"never happened: {what}"
            threading.Event().wait(0.2)

    def close(self) -> None:
        """Ends the server."""
        self._popen.terminate()
        self._popen.wait()
        self._log.close()
