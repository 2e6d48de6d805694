"""Which side moves the bytes when a worker gets blocks from a store: decided once per connection.

The rule. A worker READs where a READ is one-sided, so that the store's process has no part in it:
- both have an RDMA device; or
- both arenas are in memory of GPUs of one host (cuda_ipc); or
- both arenas are in DRAM and the worker can read the store's memory (CMA). Equal host names prove
  nothing, a container may keep processes apart: the worker reads the store's name where the store
  says that it lies.
Everywhere else UCX emulates a READ: the store's process sends the bytes, and a reader that dies
while the store is stalled takes it along. There the store WRITEs: as fast for large pulls, a
millisecond later for small ones (benchmarks/results/fetch_paths.json).

Owns the rule and the probe; never connects anything, and reads no environment.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kv.transfer import Agent

RDMA_DEVICES = Path("/dev/infiniband")


class Transport(enum.StrEnum):
    """Ways to move bytes of which the peer's process has no part; mirrors kvmesh.v1.Transport."""

    CMA = "cma"
    CUDA_IPC = "cuda_ipc"
    RDMA = "rdma"


# As UCX_TLS may call them, aliases included.
_NAMES = {
    Transport.CMA: {"cma", "sm", "shm"},
    Transport.CUDA_IPC: {"cuda_ipc", "cuda"},
    Transport.RDMA: {
        "ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5"
    },
}  # fmt: skip


class KvPath(enum.StrEnum):
    """Who moves the bytes of a pull."""

    READ = "read"
    WRITE = "write"


PATH_CHOICES = ("auto", *KvPath)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def choose(wanted: str, ours: Agent, theirs: Agent) -> KvPath:
    """The path between a worker (ours) and a store; `wanted` is one of PATH_CHOICES."""
    if wanted != "auto":
        return KvPath(wanted)
    both = set(ours.transports) & set(theirs.transports)
    is_one_sided = (
        Transport.RDMA in both
        or (Transport.CUDA_IPC in both and ours.host_id == theirs.host_id)
        or (Transport.CMA in both and _sees(theirs))
    )
    return KvPath.READ if is_one_sided else KvPath.WRITE


def one_sided(tls: str, *, is_on_gpu: bool) -> tuple[Transport, ...]:
    """The one-sided transports that a process with this arena has; `tls` is what UCX_TLS allows."""
    has = [Transport.CUDA_IPC if is_on_gpu else Transport.CMA]
    if any(os.access(device, os.R_OK | os.W_OK) for device in RDMA_DEVICES.glob("uverbs*")):
        has.append(Transport.RDMA)
    return tuple(transport for transport in has if _is_allowed(tls, _NAMES[transport]))


def read_memory(pid: int, address: int, num_bytes: int) -> bytes:
    """Another process's memory, as UCX's CMA transport reads it. OSError when that cannot be."""
    buffer = ctypes.create_string_buffer(num_bytes)
    local = _IoVec(ctypes.addressof(buffer), num_bytes)
    remote = _IoVec(address, num_bytes)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    count = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count != num_bytes:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw


def _sees(theirs: Agent) -> bool:
    name = theirs.name.encode()
    try:
        return read_memory(theirs.pid, theirs.name_address, len(name)) == name
    except (OSError, ctypes.ArgumentError):
        return False


def _is_allowed(tls: str, names: Iterable[str]) -> bool:
    """UCX_TLS is a list of what may be used, or, after ^, of what may not."""
    words = {word.strip().lstrip("\\") for word in tls.removeprefix("^").split(",")}
    is_listed = not words.isdisjoint({*names, "all"})
    return is_listed != tls.startswith("^")
