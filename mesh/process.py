"""The life of a process: signals, exit codes, readiness line, identity, and the kernel's figures.

Owns how a service starts and ends; never what it does in between.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from mesh.errors import KvmeshError

log = logging.getLogger("kvmesh.process")
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


class StartupError(Exception):
    """The process cannot start or go on; printed as one line, exit code 1."""


def run_service(
    main: Callable[[asyncio.Event], Awaitable[None]], *, die_with_parent: bool = False
) -> None:
    """Runs `main(stop)` and ends the process's work with an exit code.

    SIGTERM and SIGINT set `stop`, as does the parent's end with `die_with_parent`; a second signal
    exits 130 at once. Returns (exit code 0) when main does; a start-up, argument or system error is
    one line on stderr and SystemExit(1), its traceback at log level debug.
    """
    try:
        asyncio.run(_body(main, die_with_parent))
    except (StartupError, KvmeshError, ValueError, OSError) as error:
        log.debug("the service ends", exc_info=True)
        hint = "" if isinstance(error, StartupError) else " (--log-level debug shows where)"
        print(f"error: {error}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_FAILURE) from None


async def _body(main: Callable[[asyncio.Event], Awaitable[None]], die_with_parent: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(EXIT_INTERRUPTED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if not die_with_parent:
        return await main(stop)
    # The kernel's own PDEATHSIG fires when the parent's starting *thread* ends; a pidfd does not.
    parent = os.pidfd_open(os.getppid())

    def on_parent_end() -> None:
        loop.remove_reader(parent)
        log.info("the process that started this one has ended")
        stop.set()

    loop.add_reader(parent, on_parent_end)
    try:
        await main(stop)
    finally:
        loop.remove_reader(parent)
        os.close(parent)


class Supervisor:
    """Background tasks whose failure ends the process in an orderly way.

    A task that raises is logged and sets `stop`. `close` cancels what still runs; `raise_failure`,
    called last, turns the first failure into exit code 1.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: tuple[str, BaseException] | None = None

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts a task that is kept, named and watched."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def close(self) -> None:
        """Cancels and awaits every task."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def raise_failure(self) -> None:
        """StartupError if a task failed, naming it."""
        if self._failure is not None:
            name, error = self._failure
            raise StartupError(f"{name} failed: {error!r}") from error

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        assert error is not None
        log.error("%s failed; the process ends", task.get_name(), exc_info=error)
        self._failure = self._failure or (task.get_name(), error)
        self._stop.set()


def settle_heap() -> None:
    """Takes what is loaded out of the garbage collector's sight: a full collection of a worker's
    modules and model takes tens of milliseconds, in the middle of steps.
    """
    gc.collect()
    gc.freeze()


def announce_ready(*, role: str, address: str, incarnation: str) -> None:
    """Prints the machine-readable readiness line on stdout."""
    print(f"kvmesh-ready role={role} address={address} incarnation={incarnation}", flush=True)


def new_incarnation() -> str:
    """A random name for this life of the process: 16 hex digits."""
    return secrets.token_hex(8)


def host_id() -> str:
    """Host name and boot id: processes with equal ids share a kernel and a network name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot.read_text().strip() if boot.exists() else ''}"


def num_fds() -> int:
    """Open file descriptors, without the one that lists them; the limit when that cannot be had."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def rss_num_bytes() -> int:
    """Resident memory in bytes; the highest so far when no descriptor is left to ask with."""
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def task_count() -> int:
    """Live asyncio tasks of the running loop."""
    return len(asyncio.all_tasks())
