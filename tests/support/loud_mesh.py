"""A mesh with gates that exports everything everywhere and logs at debug, and all that it said.

Owns the receiver and what was collected: exports, log lines, scrapes, status answers, live events.
"""

from __future__ import annotations

import functools
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc

from protos import gateway_pb2, status_pb2, status_pb2_grpc
from tests.support.gated_mesh import GatedMesh
from tests.support.mesh import Process, free_port
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.series import Scrapes, Series
from tests.support.streams import Stream

ENV = {
    "OTEL_TRACES_EXPORTER": "otlp,console",
    "OTEL_METRICS_EXPORTER": "otlp,prometheus,console",
    "OTEL_EXPORTER_PROMETHEUS_PORT": "0",
    "OTEL_METRIC_EXPORT_INTERVAL": "3000",
    "KVMESH_LOG_FORMAT": "json",
    "KVMESH_LOG_LEVEL": "debug",
}
# A block has 64 tokens and 32 KiB. The store holds 32, a tenant 8, a worker 16, the disk 64.
STORE_BYTES, TENANT_BYTES, WORKER_BYTES, DISK_BYTES = "1MiB", "256KiB", "512KiB", "2304KiB"


class LoudMesh(GatedMesh):
    """`ask` and `tell` carry the metadata; `disk` is the store's directory."""

    def __init__(self, model: Path, disk: Path, metadata: list[tuple[str, str]]) -> None:
        self.receiver = OtlpReceiver()
        self.scrapes = Scrapes()
        self.disk = disk
        self._everyone: list[Process] = []
        self._statuses: dict[str, None] = {}  # each different answer once
        self._events: list[str] = []
        http_port = free_port()
        self._page = f"http://127.0.0.1:{http_port}"
        super().__init__(
            model,
            {**ENV, "OTEL_EXPORTER_OTLP_ENDPOINT": self.receiver.start()},
            store_bytes=STORE_BYTES,
            worker_flags=("--kv-bytes", WORKER_BYTES, "--kv-path", "write"),
            store_flags=(
                *("--tenant-bytes", TENANT_BYTES, "--sweep-s", "0.1"),
                *("--disk-dir", str(disk), "--disk-bytes", DISK_BYTES),
            ),
            gateway_flags=("--http-port", str(http_port), "--rank-wait-s", "3"),
        )
        told = {"metadata": metadata}
        self.calls = SimpleNamespace(
            Generate=functools.partial(self.generation.Generate, **told),
            Abort=functools.partial(self.generation.Abort, **told),
            Tokenize=functools.partial(self.models.Tokenize, **told),
            Detokenize=functools.partial(self.models.Detokenize, **told),
        )

    def stream(self, request: gateway_pb2.GenerateRequest) -> Stream:
        """A call that runs."""
        return Stream(self.calls, request)  # pyright: ignore[reportArgumentType] - has Generate

    def look(self) -> dict[Series, float]:
        """Scrapes whoever lives and asks for statuses; the sums of all series."""
        values: dict[Series, float] = {}
        for process in self.processes:
            if process.popen.poll() is None and process.address:
                for series, value in self.scrapes.scrape(process).items():
                    values[series] = values.get(series, 0.0) + value
                self._statuses |= dict.fromkeys(_statuses(process.address))
        self._statuses |= dict.fromkeys(_statuses(self.admin_address))
        return values

    def wait_moved(self, key: str, **attributes: str) -> None:
        """Looks until that series has moved."""
        self.wait_until(lambda: self.has_moved(key, **attributes), f"{key} {attributes} moves", 30)

    def has_moved(self, key: str, **attributes: str) -> bool:
        """Looks; whether that series has moved so far."""
        self.look()
        return (key, frozenset(attributes.items())) in self.scrapes.moved

    def watch_page(self) -> None:
        """Takes the next event of the live page."""
        with urllib.request.urlopen(f"{self._page}/events", timeout=20) as answer:
            self._events += [answer.readline().decode() for _ in range(2)]

    def evidence(self) -> dict[str, str]:
        """All that the mesh has said, by where."""
        return {
            "OTLP": "\n".join(self.receiver.exports),
            "/metrics": "\n".join(self.scrapes.lines),
            "status": "\n".join(self._statuses),
            "live page": "\n".join(self._events),
            **{
                f"log of {process.role} {process.popen.pid}": "\n".join(process.lines)
                for process in self._everyone
            },
        }

    def close(self) -> None:
        """Ends processes, gates and the receiver."""
        super().close()
        self.receiver.close()

    def _spawn(self, role: str, *flags: str) -> Process:
        process = super()._spawn(role, *flags)
        self._everyone.append(process)
        return process


def _statuses(address: str) -> list[str]:
    """What a process answers, books included; one without a check of its own refuses them."""
    answers: list[Any] = []
    with grpc.insecure_channel(address) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        try:
            answers.append(stub.GetStatus(status_pb2.GetStatusRequest(), timeout=10))
            answers.append(stub.CheckBooks(status_pb2.CheckBooksRequest(), timeout=10))
        except grpc.RpcError as error:
            answers.append(error)
    return [str(answer) for answer in answers]
