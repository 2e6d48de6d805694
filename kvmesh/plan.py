"""What a mesh on this machine consists of: services, their ports and their command lines.

Owns the choice of threads and flags; starts nothing. Limits and ports have modules of their own.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass, field, replace

from kvmesh.options import LOOPBACK, MeshOptions, check_options
from kvmesh.ports import loopback_addresses, port_of, public_ports


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
    http_address: str
    drain_s: float = 10.0
    stages: tuple[tuple[ServiceSpec, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", (self.kvstores, self.workers, (self.gateway,)))


def plan_mesh(options: MeshOptions) -> MeshPlan:
    """The processes for these options. Raises PlanError for what cannot work."""
    check_options(options)
    public, admin, http = ports = public_ports(
        options.host, options.port, options.admin_port, options.http_port
    )
    stores = loopback_addresses(options.num_kvstore, taken=set(ports))
    taken = {*ports, *map(port_of, stores)}
    workers = loopback_addresses(options.num_prefill + options.num_decode, taken=taken)
    prefills, decodes = workers[: options.num_prefill], workers[options.num_prefill :]
    plan = MeshPlan(
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
                *("--http-port", str(http)),
                *(("--model-name", options.model_name) if options.model_name else ()),
                *("--prefill", ",".join(prefills), "--decode", ",".join(decodes)),
                *("--kvstore", ",".join(stores)),
            ),
        ),
        admin_address=f"{options.host}:{admin}",
        http_address=f"{options.host}:{http}",
        drain_s=options.drain_s,
    )
    return plan if options.metrics_port is None else _measured(plan, options.metrics_port)


def _measured(plan: MeshPlan, port: int) -> MeshPlan:
    """The plan with a port for Prometheus each: the gateway's is the first."""
    ports = itertools.count(port)

    def measured(spec: ServiceSpec) -> ServiceSpec:
        return replace(spec, flags=(*spec.flags, "--metrics-port", str(next(ports))))

    return replace(
        plan,
        gateway=measured(plan.gateway),
        kvstores=tuple(map(measured, plan.kvstores)),
        workers=tuple(map(measured, plan.workers)),
    )


def threads_per_worker(num_workers: int) -> int:
    """CPU threads each worker may use for tensors: this process's cores, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


def connectable(address: str) -> str:
    """The address a local client dials: the wildcard host listens on loopback too."""
    host, _, port = address.rpartition(":")
    return f"{LOOPBACK if host in ('0.0.0.0', '[::]', '') else host}:{port}"


def _store(options: MeshOptions, addresses: list[str], index: int) -> ServiceSpec:
    address = addresses[index]
    return ServiceSpec(
        role="kvstore",
        name=f"kvstore-{index}",
        address=address,
        flags=(
            *_shared_flags(options, LOOPBACK, port_of(address)),
            *("--device", options.device, "--kv-bytes", options.store_size),
            *(("--host-bytes", options.store_host) if options.store_host else ()),
            *_disk(options, index),
        ),
    )


def _disk(options: MeshOptions, index: int) -> tuple[str, ...]:
    """A directory of its own for each store: two never share one."""
    if options.store_disk is None:
        return ()
    directory = options.store_disk / f"kvstore-{index}"
    return ("--disk-dir", str(directory), "--disk-bytes", options.store_disk_bytes)


def _worker(
    options: MeshOptions, role: str, index: int, address: str, stores: list[str]
) -> ServiceSpec:
    threads = threads_per_worker(options.num_prefill + options.num_decode)
    return ServiceSpec(
        role=role,
        name=f"{role}-{index}",
        address=address,
        flags=(
            *_shared_flags(options, LOOPBACK, port_of(address)),
            *("--model", str(options.model), "--kvstore", ",".join(stores)),
            *(("--model-name", options.model_name) if options.model_name else ()),
            *("--device", options.device, "--dtype", options.dtype),
            *("--kv-dtype", options.kv_dtype, "--load-format", options.load_format),
            *("--gpu-memory-fraction", str(options.gpu_memory_fraction)),
            *("--num-threads", str(threads), "--kv-path", options.kv_path),
            *_sizes(options),
        ),
    )


def _sizes(options: MeshOptions) -> tuple[str, ...]:
    given = (
        ("--kv-bytes", options.kv_bytes),
        ("--block-tokens", options.block_tokens),
        ("--max-batch", options.max_batch),
        ("--chunk-tokens", options.chunk_tokens),
    )
    return tuple(word for flag, n in given if n is not None for word in (flag, str(n)))


def _shared_flags(options: MeshOptions, host: str, port: int) -> tuple[str, ...]:
    return (
        *("--host", host, "--port", str(port), "--die-with-parent"),
        *("--log-format", options.log_format, "--log-level", options.log_level),
        *("--drain-s", str(options.drain_s)),
    )
