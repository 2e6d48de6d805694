"""Which ports of this machine a mesh takes: free ones, all distinct.

Owns the probing; holds nothing afterwards, so another process may still come first.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from kvmesh.options import LOOPBACK, PlanError

MAX_PORT = 65535
_OFFSETS = {"--admin-port": 1, "--http-port": 2}  # from the public port


def public_ports(
    host: str, port: int, admin_port: int | None, http_port: int | None
) -> tuple[int, int, int]:
    """Port, admin port and the live page's, all free now and distinct.

    0 picks one; None is the port after, and the one after that. Raises PlanError for a host that
    is not this machine's and for ports that cannot be had.
    """
    _check_host(host)
    asked = {"--port": port, "--admin-port": admin_port, "--http-port": http_port}
    given = {flag: number for flag, number in asked.items() if number}
    for flag, number in given.items():
        _require_free(flag, host, number)
    beside = {flag: offset for flag, offset in _OFFSETS.items() if asked[flag] is None}
    if port:
        chosen = given | _beside(host, port, beside)
    else:
        chosen = given | _pick_with_beside(host, beside, taken=set(given.values()))
    _require_distinct(chosen)
    for flag in [flag for flag in asked if flag not in chosen]:
        chosen[flag] = _free_port(host, taken=set(chosen.values()))
    return chosen["--port"], chosen["--admin-port"], chosen["--http-port"]


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


def _beside(host: str, port: int, offsets: dict[str, int]) -> dict[str, int]:
    for flag, offset in offsets.items():
        if port + offset > MAX_PORT:
            raise PlanError(f"--port {port}: {flag} would be {port + offset}; give {flag}")
        _require_free(flag, host, port + offset)
    return {flag: port + offset for flag, offset in offsets.items()}


def _pick_with_beside(host: str, offsets: dict[str, int], *, taken: set[int]) -> dict[str, int]:
    """A free port whose neighbours are free, too."""
    while True:
        port = _free_port(host, taken=taken)
        beside = {flag: port + offset for flag, offset in offsets.items()}
        if all(
            number <= MAX_PORT and number not in taken and _is_free(flag, host, number)
            for flag, number in beside.items()
        ):
            return {"--port": port, **beside}


def _require_distinct(ports: dict[str, int]) -> None:
    owners: dict[int, str] = {}
    for flag, port in ports.items():
        if port in owners:
            raise PlanError(f"{flag} {port} is the {owners[port]}; give another, or 0 for any")
        owners[port] = flag


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
