"""Which ports of this machine a mesh takes: free ones, all distinct.

Owns the probing; holds nothing afterwards, so another process may still come first.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from kvmesh.options import LOOPBACK, PlanError

MAX_PORT = 65535


def public_ports(host: str, port: int, admin_port: int | None) -> tuple[int, int]:
    """Port and admin port, both free now; 0 picks one, an admin_port of None is port + 1.

    Raises PlanError for a host that is not this machine's and for ports that cannot be had.
    """
    _check_host(host)
    for flag, number in (("--port", port), ("--admin-port", admin_port)):
        if number:
            _require_free(flag, host, number)
    if admin_port is None:
        return _with_next(host, port)
    if port and port == admin_port:
        raise PlanError(f"--admin-port {admin_port} is the --port; give another, or 0 for any")
    public = port or _free_port(host, taken={admin_port})
    return public, admin_port or _free_port(host, taken={public})


def loopback_addresses(count: int, *, taken: set[int]) -> list[str]:
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


def port_of(address: str) -> int:
    """The port of host:port."""
    return int(address.rpartition(":")[2])


def _with_next(host: str, port: int) -> tuple[int, int]:
    if port == MAX_PORT:
        raise PlanError(f"--port {port}: the admin port is the next one; give --admin-port")
    if port:
        _require_free("--admin-port", host, port + 1)
        return port, port + 1
    public = _free_port(host, taken={MAX_PORT})
    while not _is_free("--admin-port", host, public + 1):
        public = _free_port(host, taken={MAX_PORT})
    return public, public + 1


def _check_host(host: str) -> None:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PlanError(
                f"--host {host} is not an IPv4 address or a name of this machine ({why}); give "
                f"one of its own, {LOOPBACK} for this machine only, or 0.0.0.0 for all"
            ) from None


def _require_free(flag: str, host: str, port: int) -> None:
    if not 1 <= port <= MAX_PORT:
        raise PlanError(f"{flag} {port}: ports are 1 to {MAX_PORT}, or 0 for any")
    if not _is_free(flag, host, port):
        raise PlanError(
            f"{flag} {port} is taken on {host}: another mesh may be running "
            f"(kvmesh status); give another port, or {flag} 0 for any"
        )


def _free_port(host: str, *, taken: set[int]) -> int:
    while (port := _pick(host)) in taken:
        pass
    return port


def _pick(host: str) -> int:
    with socket.socket() as holder:
        holder.bind((host, 0))
        return holder.getsockname()[1]


def _is_free(flag: str, host: str, port: int) -> bool:
    """Whether nobody listens there; PlanError when this process may not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise PlanError(f"{flag} {port} cannot be opened on {host}: {error}") from None
    return True
