"""The life of a process: signals, exit codes, logs, identity, and what the kernel says about it."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class StartupError(Exception):
    """The process cannot start; printed as one line, exit code 1."""


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs `main(stop)`; SIGTERM and SIGINT set stop, a second one exits 130. Exits 0 after a drain."""

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(130)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await main(stop)

    try:
        asyncio.run(body())
    except (StartupError, ValueError, OSError) as error:
        logging.getLogger("kvmesh").debug("start-up failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def die_with_parent() -> None:
    """Asks the kernel to end this process when the one that started it ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        sys.exit(1)


def announce_ready(*, role: str, address: str, incarnation: str) -> None:
    """Prints the machine-readable readiness line."""
    print(f"kvmesh-ready role={role} address={address} incarnation={incarnation}", flush=True)


def new_incarnation() -> str:
    """A random name for this life of the process."""
    return secrets.token_hex(8)


def host_id() -> str:
    """Host name and boot: equal ids can share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot.read_text().strip() if boot.exists() else ''}"


def num_fds() -> int:
    """Open file descriptors."""
    return len(os.listdir("/proc/self/fd"))


def rss_num_bytes() -> int:
    """Resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def task_count() -> int:
    """Live asyncio tasks."""
    return len(asyncio.all_tasks())


def setup_logging(log_format: str, level: str, role: str) -> None:
    """Logs to stderr as text or one JSON object a line."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(_JsonFormatter(role))
    else:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _JsonFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
