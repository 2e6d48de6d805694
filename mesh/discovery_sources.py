"""Sources of addresses that change: a file that lists them, a name in DNS.

Owns looking, off the event loop and in bounded time. Never remembers a good list: Discovery does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

Resolve = Callable[[str, int], Awaitable[list[str]]]
T = TypeVar("T")
_Signature = tuple[int, int, int, int]

FILE_INTERVAL_S = 1.0
DNS_INTERVAL_S = 5.0
DNS_TIMEOUT_S = 2.0
_MAX_FILE_NUM_BYTES = 2**20


class SourceError(Exception):
    """A source cannot be had now, or says nothing sensible."""


class Source(Protocol):
    """What is looked at every interval_s seconds. `name` is as it was given."""

    name: str
    interval_s: float

    async def look(self) -> tuple[str, ...] | None:
        """The addresses; None: as they were. SourceError: nobody can tell."""
        ...

    def close(self) -> None:
        """Forgets a look under way."""
        ...


class FileSource:
    """One host:port a line, with comments (#) and blank lines.

    A change counts when two looks read the same: half a list that is just being written is not
    taken for one. An empty file is one cut short; comments alone mean that there are none.
    """

    def __init__(self, name: str, path: str, is_address: Callable[[str], bool]) -> None:
        self.name = name
        self.interval_s = FILE_INTERVAL_S
        self._path = Path(path).expanduser()
        self._is_address = is_address
        self._is_first = True
        self._seen: tuple[_Signature, bytes] | None = None  # at the last look that read
        self._known: _Signature | None = None  # of what has been told, once it is sure

    async def look(self) -> tuple[str, ...] | None:
        """See Source.look."""
        is_first, self._is_first = self._is_first, False
        try:
            signature = await in_thread(_sign, self._path)
            if signature == self._known:
                return None
            data = await in_thread(self._path.read_bytes)
        except OSError as error:
            self._seen = self._known = None
            raise SourceError(error.strerror or str(error)) from None
        before, self._seen = self._seen, (signature, data)
        if before == self._seen:
            self._known = signature
        if is_first or (before is not None and before[1] == data):
            return self._parse(data)
        return None

    def close(self) -> None:
        """See Source.close."""

    def _parse(self, data: bytes) -> tuple[str, ...]:
        if not data.strip():
            raise SourceError("the file is empty (for no addresses, write a comment)")
        found: dict[str, None] = {}
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            text = line.partition("#")[0].strip()
            if text and not self._is_address(text):
                raise SourceError(f"line {number}: {text[:80]!r} is not host:port")
            if text:
                found[text] = None
        return tuple(found)


class DnsSource:
    """Every address a host name has, with one port."""

    def __init__(self, name: str, host: str, port: int, resolve: Resolve) -> None:
        self.name = name
        self.interval_s = DNS_INTERVAL_S
        self._host, self._port = host, port
        self._resolve = resolve
        self._lookup: asyncio.Future[list[str]] | None = None

    async def look(self) -> tuple[str, ...] | None:
        """See Source.look. One that takes too long is waited for again: never two at a time."""
        if self._lookup is None:
            self._lookup = asyncio.ensure_future(self._resolve(self._host, self._port))
        await asyncio.wait([self._lookup], timeout=DNS_TIMEOUT_S)
        if not self._lookup.done():
            raise SourceError(f"no answer within {DNS_TIMEOUT_S:g} s")
        lookup, self._lookup = self._lookup, None
        try:
            found = lookup.result()
        except (OSError, UnicodeError) as error:
            raise SourceError(getattr(error, "strerror", None) or str(error)) from None
        if not found:
            raise SourceError("the name has no addresses")
        return tuple(sorted(set(found)))

    def close(self) -> None:
        """See Source.close."""
        if self._lookup is not None:
            self._lookup.cancel()


async def resolve_host(host: str, port: int) -> list[str]:
    """host:port for every address of a host: IPv4 if it has any, or a store would count twice.

    OSError: there are none, or nobody knows.
    """
    answers = await in_thread(
        lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    )
    hosts = {family: [] for family in (socket.AF_INET, socket.AF_INET6)}
    for family, _, _, _, address in answers:
        if family in hosts:
            hosts[family].append(str(address[0]))
    if hosts[socket.AF_INET]:
        return [f"{host}:{port}" for host in hosts[socket.AF_INET]]
    return [f"[{host}]:{port}" for host in hosts[socket.AF_INET6]]


def in_thread(fn: Callable[..., T], *args: object) -> asyncio.Future[T]:
    """Runs fn(*args) in a thread of its own that ends with the process.

    An executor's threads are joined at exit, also those that a resolver or a file system keeps.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result, failure = None, None
        try:
            result = fn(*args)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True, name="discovery").start()
    return future


def _sign(path: Path) -> _Signature:
    """What differs when a regular file was written or replaced; OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("this is not a regular file")
    if status.st_size > _MAX_FILE_NUM_BYTES:
        raise OSError(f"the file has {status.st_size} bytes, limit {_MAX_FILE_NUM_BYTES}")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
