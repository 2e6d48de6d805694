"""A whole mesh of real processes for end-to-end tests and benchmarks.

Owns the processes' life; never reaches into them: it talks gRPC and signals only.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos import gateway_pb2_grpc, status_pb2, status_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"^kvmesh-ready role=(\S+) address=(\S+) incarnation=(\S+)")
START_TIMEOUT_S = 300.0  # of a large model on a GPU, which compiles its kernels first


@dataclass
class Process:
    """One service process and the lines it printed."""

    role: str
    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    address: str = ""
    ready: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        """Collects output until the process ends; runs in a thread."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip())
            if match := READY.match(line):
                self.address = match.group(2)
                self.ready.set()
        self.ready.set()

    def tail(self) -> str:
        """The last lines, for failure messages."""
        return "\n".join(self.lines[-40:])


def spawn(
    role: str, *flags: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Process:
    """Starts `python -m services.ROLE`, behind a command that runs it, without waiting for it."""
    popen = subprocess.Popen(
        [*prefix, sys.executable, "-m", f"services.{role}", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    process = Process(role, popen)
    threading.Thread(target=process.read, daemon=True).start()
    return process


def wait_ready(process: Process) -> None:
    """Blocks until the process printed its readiness line; fails with its output otherwise."""
    if not process.ready.wait(START_TIMEOUT_S) or not process.address:
        raise AssertionError(f"{process.role} did not become ready:\n{process.tail()}")


class Mesh:
    """gateway, prefill(s), decode(s) and kvstore(s) as processes."""

    def __init__(
        self,
        model: Path,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        num_kvstore: int = 1,
        store_bytes: str = "64MiB",
        worker_flags: Sequence[str] = (),
        store_flags: Sequence[str] = (),
        gateway_flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.model = model
        self._env = env
        self._worker_flags = (
            "--model", str(model), "--kv-bytes", "64MiB", "--num-threads", "1", *worker_flags
        )  # fmt: skip
        self._store_flags = ("--kv-bytes", store_bytes, *store_flags)
        self._gateway_flags = gateway_flags
        self.admin_address = f"127.0.0.1:{free_port()}"
        self.kvstores = [self.spawn_store() for _ in range(num_kvstore)]
        for process in self.kvstores:
            wait_ready(process)
        self.prefills = [self.spawn_worker("prefill") for _ in range(num_prefill)]
        self.decodes = [self.spawn_worker("decode") for _ in range(num_decode)]
        for process in [*self.prefills, *self.decodes]:
            wait_ready(process)
        self.gateway = self.spawn_gateway()
        wait_ready(self.gateway)
        self.address = self.gateway.address
        self.channel = grpc.insecure_channel(self.address)
        self.generation = gateway_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = gateway_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def processes(self) -> list[Process]:
        """Every process, gateway first."""
        return [self.gateway, *self.prefills, *self.decodes, *self.kvstores]

    def route(self, user: str, process: Process) -> str:
        """The address at which processes of role `user` find this one."""
        return process.address

    def store_sources(self, user: str) -> str:
        """What processes of role `user` get as --kvstore."""
        return ",".join(self.route(user, process) for process in self.kvstores)

    def spawn_worker(self, role: str, *, port: int = 0) -> Process:
        """Starts one more worker with this mesh's flags."""
        stores = self.store_sources(role)
        return self._spawn(role, *self._worker_flags, "--kvstore", stores, "--port", str(port))

    def spawn_store(self, *, port: int = 0) -> Process:
        """Starts one more kvstore with this mesh's flags."""
        return self._spawn("kvstore", *self._store_flags, "--port", str(port))

    def spawn_gateway(self, *, port: int = 0) -> Process:
        """Starts a gateway to all workers."""

        def addresses(processes: list[Process]) -> str:
            return ",".join(self.route("gateway", process) for process in processes)

        return self._spawn(
            "gateway",
            *("--model", str(self.model), "--port", str(port)),
            *("--admin-port", self.admin_address.rpartition(":")[2]),
            *("--prefill", addresses(self.prefills), "--decode", addresses(self.decodes)),
            *("--kvstore", self.store_sources("gateway"), *self._gateway_flags),
        )

    def respawn(self, process: Process) -> Process:
        """Starts the successor of an ended process on its address, without waiting for it."""
        port = int(process.address.rpartition(":")[2])
        if process is self.gateway:
            successor = self.gateway = self.spawn_gateway(port=port)
        elif process in self.kvstores:
            successor = self.spawn_store(port=port)
            self.kvstores[self.kvstores.index(process)] = successor
        else:
            successor = self.spawn_worker(process.role, port=port)
            workers = self.prefills if process in self.prefills else self.decodes
            workers[workers.index(process)] = successor
        return successor

    def status(self, address: str) -> status_pb2.InstanceStatus:
        """One process's own status."""
        with grpc.insecure_channel(address) as channel:
            stub = status_pb2_grpc.StatusServiceStub(channel)
            return stub.GetStatus(status_pb2.GetStatusRequest(), timeout=10).instances[0]

    def wait_until(self, condition: object, what: str, timeout_s: float = 20.0) -> None:
        """Polls a callable until it is true; fails naming what was awaited."""
        assert callable(condition)
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                tails = "\n".join(f"--- {p.role}\n{p.tail()}" for p in self.processes)
                raise AssertionError(f"never happened: {what}\n{tails}")
            threading.Event().wait(0.05)

    def close(self) -> None:
        """Terminates all processes, gateway first, and kills what does not end."""
        self.channel.close()
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(5)
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()

    def _spawn(self, role: str, *flags: str) -> Process:
        return spawn(role, *flags, env=self._env)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return holder.getsockname()[1]


@contextlib.contextmanager
def running_mesh(model: Path, **options: object) -> Iterator[Mesh]:
    """A mesh for the length of a with block."""
    mesh = Mesh(model, **options)  # type: ignore[arg-type]
    try:
        yield mesh
    finally:
        mesh.close()
