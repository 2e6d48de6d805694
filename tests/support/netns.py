"""A network namespace joined to this one by two links: one for control, one for data.

Owns the namespace and the links; needs iproute2 and the right to make them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CONTROL, DATA = "control", "data"
# By process, so that two test runs on one machine do not share addresses.
_FIRST = 2 * (os.getpid() % 128)
_SUBNETS = {CONTROL: f"10.213.{_FIRST}", DATA: f"10.213.{_FIRST + 1}"}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Namespace:
    """Build, start processes with `prefix`, `cut` links, `close`. OSError when it cannot be had."""

    def __init__(self) -> None:
        self.name = f"kvmesh-{os.getpid()}"
        self.prefix = ("ip", "netns", "exec", self.name)
        try:
            _ip("netns", "add", self.name)
            _ip("-n", self.name, "link", "set", "lo", "up")
            for link, subnet in _SUBNETS.items():
                here, there = self.device(link), f"{link}-in"
                _ip("link", "add", here, "type", "veth", "peer", there, "netns", self.name)
                _ip("addr", "add", f"{subnet}.1/24", "dev", here)
                _ip("-n", self.name, "addr", "add", f"{subnet}.2/24", "dev", there)
                _ip("link", "set", here, "up")
                _ip("-n", self.name, "link", "set", there, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise OSError(f"no network namespace: {getattr(error, 'stderr', error)}") from error

    @property
    def host(self) -> str:
        """The namespace's address on the control link."""
        return f"{_SUBNETS[CONTROL]}.2"

    def device(self, link: str) -> str:
        """The outer end of a link."""
        return f"kv{os.getpid() % 100_000}{link[0]}"

    @contextmanager
    def cut(self, link: str) -> Iterator[None]:
        """A black hole: packets vanish while inside, nobody is told."""
        inner = ("-n", self.name, "link", "set", f"{link}-in")
        _ip(*inner, "down")
        try:
            yield
        finally:
            _ip(*inner, "up")

    def close(self) -> None:
        """Ends the namespace, and the links with it."""
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)
