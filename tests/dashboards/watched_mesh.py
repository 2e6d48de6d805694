"""The CPU demo mesh under a load in which everything happens that the boards show, and Prometheus.

Owns the script of the load. Each step is there for a metric that nothing else would move.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support.generate import generate, greedy_request
from tests.support.injectors import kill
from tests.support.mesh import ROOT, Mesh, Process, running_mesh
from tests.support.prometheus import JOB, Programs, Prometheus
from tests.support.streams import Stream

ENV = {"OTEL_EXPORTER_PROMETHEUS_PORT": "0"}
VOCABULARY = 4096
# A block of the demo model has 64 tokens and 384 KiB. The store holds sixteen, a rank as many.
NUM_BYTES = "6MiB"
PROMPT_LEN = 400
_PORT = re.compile(r"metrics at http://(\S+)/metrics")


@contextlib.contextmanager
def watched_mesh(programs: Programs, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the whole load, which ended in a killed rank."""
    disk = folder / "disk"
    with running_mesh(
        ROOT / "models/demo",
        num_decode=2,
        store_bytes=NUM_BYTES,
        store_flags=("--disk-dir", str(disk), "--disk-bytes", "64MiB"),
        worker_flags=("--kv-bytes", NUM_BYTES),
        env=ENV,
    ) as mesh:
        targets = [_target(process) for process in mesh.processes]
        server = Prometheus(programs, folder, targets, ROOT / "dashboards/alerts.yaml")
        try:
            _wait_scraped(mesh, server, len(targets))
            _load(mesh, disk)
            _wait_scraped(mesh, server, len(targets) - 1)
            yield server
        finally:
            server.close()


def _target(process: Process) -> str:
    found = [match.group(1) for line in process.lines if (match := _PORT.search(line))]
    assert found, process.tail()
    return found[0]


def _wait_scraped(mesh: Mesh, server: Prometheus, num_targets: int) -> None:
    """Scrapes two seconds from now, a second after others: what just appeared has a rate."""
    up = f'up{{job="{JOB}"}}'
    query = f"count({up} == 1 and timestamp({up}) > {time.time() + 2:.3f})"

    def num_scraped() -> int:
        result = server.get("query", query=query)["result"]
        return int(result[0]["value"][1]) if result else 0

    mesh.wait_until(lambda: num_scraped() == num_targets, "every process is scraped", 60)


def _load(mesh: Mesh, disk: Path) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(PROMPT_LEN)] for _ in range(6)]
    for prompt in prompts:  # more blocks than the store's memory holds: evictions, moves to disk
        generate(mesh, greedy_request(prompt, 8))
    for prompt in prompts:  # hits in memory and on disk
        generate(mesh, greedy_request(prompt, 8))
    _spoil(mesh, disk)
    for prompt in prompts:  # blocks whose digest is wrong
        generate(mesh, greedy_request(prompt, 8))
    with pytest.raises(grpc.RpcError):  # a rejection
        generate(mesh, greedy_request([VOCABULARY], 8))
    _crowd(mesh)
    _lose_a_rank(mesh)


def _spoil(mesh: Mesh, disk: Path) -> None:
    """Flips a bit of every block on disk."""
    address = mesh.kvstores[0].address
    mesh.wait_until(lambda: mesh.status(address).counts.num_blocks_on_disk > 0, "blocks on disk")
    for path in disk.glob("*.kv"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)


def _crowd(mesh: Mesh) -> None:
    """Sequences that together outgrow a rank's blocks, a slow reader and one that leaves."""
    streams = [Stream(mesh.generation, greedy_request([n] * 100, 300)) for n in range(10)]
    with streams[0].paused():
        streams[1].wait_tokens(2)
        streams[1].cancel()
        for stream in streams[2:]:
            stream.result()
    streams[0].result()
    streams[1].failure()


def _lose_a_rank(mesh: Mesh) -> None:
    """Kills one of two ranks in the middle of an answer of each; the other takes over."""
    streams = [Stream(mesh.generation, greedy_request([n] * 70, 200)) for n in range(20, 24)]
    for stream in streams:
        stream.wait_tokens(3)
    kill(mesh.decodes[0])
    for stream in streams:
        stream.result()
