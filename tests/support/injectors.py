"""Faults done to a process. Each proves that it happened before it returns.

Owns signals, limits and memory of processes that a test started; never touches others.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from tests.support.mesh import Mesh, Process, wait_ready


def kill(process: Process) -> None:
    """SIGKILL; the process is gone when this returns."""
    process.popen.kill()
    assert process.popen.wait(10) == -signal.SIGKILL


def restart(mesh: Mesh, process: Process) -> Process:
    """SIGKILL and a successor on the same address, ready and of another incarnation."""
    kill(process)
    return revive(mesh, process)


def revive(mesh: Mesh, process: Process) -> Process:
    """A successor of a dead process on its address, ready and of another incarnation."""
    successor = mesh.respawn(process)
    wait_ready(successor)
    assert successor.address == process.address
    assert incarnation_of(successor) != incarnation_of(process)
    return successor


@contextmanager
def frozen(mesh: Mesh, process: Process) -> Iterator[None]:
    """SIGSTOP until left: every thread of the process is stopped while inside."""
    process.popen.send_signal(signal.SIGSTOP)
    try:
        mesh.wait_until(lambda: is_stopped(process), f"{process.role} stops")
        yield
        assert is_stopped(process), "it ran while it was meant to be frozen"
    finally:
        process.popen.send_signal(signal.SIGCONT)
    mesh.wait_until(lambda: not is_stopped(process), f"{process.role} goes on")


def is_stopped(process: Process) -> bool:
    """Whether all threads are stopped by a signal."""
    tasks = Path(f"/proc/{process.popen.pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in tasks)


def incarnation_of(process: Process) -> str:
    """As the process printed it."""
    lines = [line for line in process.lines if line.startswith("kvmesh-ready")]
    return lines[-1].rpartition("incarnation=")[2]


@contextmanager
def without_descriptors(process: Process) -> Iterator[None]:
    """No descriptor more than it has now; proven by a connection that it cannot accept."""
    pid = process.popen.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        assert highest >= 3
        assert not _connects(process.address), "it had a descriptor for a new connection"
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _connects(address: str) -> bool:
    own = [("grpc.use_local_subchannel_pool", 1)]  # no connection that is there already
    with grpc.insecure_channel(address, options=own) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            return False
        return True


def read_memory(process: Process, address: int, num_bytes: int) -> bytes:
    """Bytes of another process."""
    with Path(f"/proc/{process.popen.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(num_bytes)


def write_memory(process: Process, address: int, data: bytes) -> None:
    """Overwrites bytes of another process; proven by reading them back."""
    assert read_memory(process, address, len(data)) != data, "nothing would change"
    with Path(f"/proc/{process.popen.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        assert memory.write(data) == len(data)
    assert read_memory(process, address, len(data)) == data
