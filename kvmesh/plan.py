"""What a mesh on this machine consists of: services, their ports and their command lines.

Owns the choice of ports, threads and flags; starts nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mesh.settings import parse_bytes

LOOPBACK = "127.0.0.1"


class PlanError(Exception):
    """The mesh cannot be started as asked; the message names the flag, the value and the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshOptions:
    """The flags of `kvmesh up`; port 0 picks a free one, admin_port None is port + 1."""

    model: Path
    model_name: str = ""
    num_prefill: int = 1
    num_decode: int = 1
    num_kvstore: int = 1
    host: str = LOOPBACK
    port: int = 50051
    admin_port: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    kv_bytes: str = "256MiB"
    store_bytes: str = "256MiB"
    log_format: str = "text"
    log_level: str = "info"
    drain_s: float = 10.0
    worker_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """One process: its role, its name in logs, where it listens and its flags."""

    role: str
    name: str
    address: str
    flags: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command line; -u so that lines arrive when they are written."""
        return [sys.executable, "-u", "-m", f"services.{self.role}", *self.flags]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """Every process of a mesh; the stages drain in reverse, the gateway first."""

    kvstores: tuple[ServiceSpec, ...]
    workers: tuple[ServiceSpec, ...]
    gateway: ServiceSpec
    admin_address: str
    drain_s: float = 10.0
    stages: tuple[tuple[ServiceSpec, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", (self.kvstores, self.workers, (self.gateway,)))


def plan_mesh(options: MeshOptions) -> MeshPlan:
    """The processes for these options. Raises PlanError for what cannot work."""
    _check(options)
    public, admin = _public_ports(options)
    stores = _addresses(options.num_kvstore, taken={public, admin})
    taken = {public, admin, *map(_port_of, stores)}
    workers = _addresses(options.num_prefill + options.num_decode, taken=taken)
    prefills, decodes = workers[: options.num_prefill], workers[options.num_prefill :]
    return MeshPlan(
        kvstores=tuple(_store(options, stores, index) for index in range(len(stores))),
        workers=(
            *(_worker(options, "prefill", index, a, stores) for index, a in enumerate(prefills)),
            *(_worker(options, "decode", index, a, stores) for index, a in enumerate(decodes)),
        ),
        gateway=ServiceSpec(
            role="gateway",
            name="gateway",
            address=f"{options.host}:{public}",
            flags=(
                *_shared_flags(options, options.host, public),
                *("--model", str(options.model), "--admin-port", str(admin)),
                *(("--model-name", options.model_name) if options.model_name else ()),
                *("--prefill", ",".join(prefills), "--decode", ",".join(decodes)),
                *("--kvstore", ",".join(stores)),
            ),
        ),
        admin_address=f"{options.host}:{admin}",
        drain_s=options.drain_s,
    )


def threads_per_worker(num_workers: int) -> int:
    """CPU threads each worker may use for tensors: this process's cores, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


def connectable(address: str) -> str:
    """The address a local client dials: the wildcard host listens on loopback too."""
    host, _, port = address.rpartition(":")
    return f"{LOOPBACK if host in ('0.0.0.0', '[::]', '') else host}:{port}"


def _check(options: MeshOptions) -> None:
    if not (options.model / "config.json").is_file():
        raise PlanError(
            f"--model {options.model}: no config.json there; give a directory in Hugging Face "
            "layout (config.json, tokenizer files, *.safetensors)"
        )
    for flag, value in (
        ("--prefill", options.num_prefill),
        ("--decode", options.num_decode),
        ("--kvstore", options.num_kvstore),
    ):
        if not 1 <= value <= 64:
            raise PlanError(f"{flag} {value}: give 1 to 64")
    for flag, text in (("--kv-bytes", options.kv_bytes), ("--store-bytes", options.store_bytes)):
        try:
            parse_bytes(text)
        except ValueError as error:
            raise PlanError(f"{flag}: {error}") from None


def _store(options: MeshOptions, addresses: list[str], index: int) -> ServiceSpec:
    address = addresses[index]
    return ServiceSpec(
        role="kvstore",
        name=f"kvstore-{index}",
        address=address,
        flags=(
            *_shared_flags(options, LOOPBACK, _port_of(address)),
            *("--kv-bytes", options.store_bytes),
        ),
    )


def _worker(
    options: MeshOptions, role: str, index: int, address: str, stores: list[str]
) -> ServiceSpec:
    threads = threads_per_worker(options.num_prefill + options.num_decode)
    return ServiceSpec(
        role=role,
        name=f"{role}-{index}",
        address=address,
        flags=(
            *_shared_flags(options, LOOPBACK, _port_of(address)),
            *("--model", str(options.model), "--kvstore", ",".join(stores)),
            *(("--model-name", options.model_name) if options.model_name else ()),
            *("--device", options.device, "--dtype", options.dtype),
            *("--kv-bytes", options.kv_bytes, "--num-threads", str(threads)),
            *options.worker_flags,
        ),
    )


def _shared_flags(options: MeshOptions, host: str, port: int) -> tuple[str, ...]:
    return (
        *("--host", host, "--port", str(port), "--die-with-parent"),
        *("--log-format", options.log_format, "--log-level", options.log_level),
        *("--drain-s", str(options.drain_s)),
    )


def _public_ports(options: MeshOptions) -> tuple[int, int]:
    """Port and admin port, both free now."""
    if options.port == 0:
        public = _free_port(options.host, taken=set())
        while options.admin_port is None and not _is_free(options.host, public + 1):
            public = _free_port(options.host, taken={public})
        return public, options.admin_port or public + 1
    admin = options.port + 1 if options.admin_port is None else options.admin_port
    for flag, port in (("--port", options.port), ("--admin-port", admin)):
        if not 1 <= port <= 65535:
            raise PlanError(f"{flag} {port}: ports are 1 to 65535")
        if not _is_free(options.host, port):
            raise PlanError(
                f"{flag} {port} is taken on {options.host}: another mesh may be running "
                "(kvmesh status); give another port, or --port 0 for any"
            )
    return options.port, admin


def _addresses(count: int, *, taken: set[int]) -> list[str]:
    """Loopback addresses with distinct free ports; all are held until the last is chosen."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            holder = stack.enter_context(socket.socket())
            holder.bind((LOOPBACK, 0))
            port = holder.getsockname()[1]
            if port not in taken:
                ports.append(port)
    return [f"{LOOPBACK}:{port}" for port in ports]


def _free_port(host: str, *, taken: set[int]) -> int:
    while True:
        with socket.socket() as holder:
            holder.bind((host, 0))
            port = holder.getsockname()[1]
        if port not in taken and port < 65535:
            return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
