"""`kvmesh top`: the decode steps and instances of a mesh, live in the terminal.

Owns the terminal: it is given back on q, Ctrl-C, SIGTERM and while suspended. A gateway that is
gone is asked again each interval; what it said last stays on the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import termios
import tty
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc

from kvmesh.status import admin_address
from kvmesh.top_frame import frame, paint
from mesh.errors import KvmeshError, from_rpc_error
from mesh.step_rates import Board, RateTracker
from protos import status_pb2, status_pb2_grpc

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.2, 3600.0
TIMEOUT_S = 5.0
PIPED_WIDTH = 120
MAX_BOARDS = 600
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000))
_ENTER = "\x1b[?1049h\x1b[?25l"  # the other screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--admin-addr", help="the gateway's admin port; default: the port after --addr"
    )
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two frames")
    parser.add_argument(
        "--once", action="store_true", help="print the figures of one interval and end"
    )


def run_top(args: argparse.Namespace) -> int:
    """Shows frames until told to stop; with --once exit code 1 when nothing answers."""
    if not MIN_INTERVAL_S <= args.interval <= MAX_INTERVAL_S:
        limits = f"{MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds"
        print(f"kvmesh top: --interval {args.interval}: give {limits}", file=sys.stderr)
        return 2
    address = args.admin_addr or admin_address(args.addr)
    try:
        return asyncio.run(_run(address, args.interval, args.once))
    except KvmeshError as error:
        print(f"kvmesh top: nothing answers at {address}: {error}", file=sys.stderr)
        return 1


async def _run(address: str, interval_s: float, is_once: bool) -> int:
    async with _Mesh(address) as mesh:
        if is_once:
            await mesh.look()
            await asyncio.sleep(interval_s)
            await mesh.look()
            print(mesh.render(PIPED_WIDTH, is_coloured=False), flush=True)
            return 0
        await _follow(mesh, interval_s)
        return 0


async def _follow(mesh: _Mesh, interval_s: float) -> None:
    """Frames until q or a signal; into a pipe as plain text, one after the other."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with _Screen(stop) if sys.stdout.isatty() else contextlib.nullcontext() as screen:
        looking = asyncio.ensure_future(_look_for_ever(mesh, interval_s, screen))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({looking, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (looking, stopped):
            task.cancel()
        await asyncio.wait({looking, stopped})
        if not looking.cancelled():
            looking.result()


async def _look_for_ever(mesh: _Mesh, interval_s: float, screen: _Screen | None) -> None:
    while True:
        try:
            await mesh.look()
        except KvmeshError as error:
            mesh.trouble = f"the gateway is gone, trying again: {error}"
        if screen is None:
            print(mesh.render(PIPED_WIDTH, is_coloured=False), end="\n\n", flush=True)
        else:
            screen.show(mesh)
        await asyncio.sleep(interval_s)


class _Mesh:
    """The gateway's admin port and what it said."""

    def __init__(self, address: str) -> None:
        self.trouble = ""
        self._address = address
        self._tracker = RateTracker()
        self._boards: deque[Board] = deque(maxlen=MAX_BOARDS)

    async def __aenter__(self) -> _Mesh:
        self._channel = grpc.aio.insecure_channel(self._address, options=_RECONNECT)
        self._stub = status_pb2_grpc.StatusServiceStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def look(self) -> None:
        """Asks once. Raises KvmeshError."""
        try:
            answer = await self._stub.GetStatus(status_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        self._boards.append(self._tracker.observe(answer.instances))
        self.trouble = ""

    def render(self, width: int, *, is_coloured: bool) -> str:
        """The present frame."""
        return "\n".join(self.lines(width, is_coloured=is_coloured))

    def lines(self, width: int, *, is_coloured: bool) -> Iterator[str]:
        """The present frame's lines."""
        lines = frame(list(self._boards), source=self._address, trouble=self.trouble, width=width)
        return (paint(line, width=width, is_coloured=is_coloured) for line in lines)


class _Screen:
    """The terminal while frames are on it; q on its keyboard, if it has one, sets `stop`."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] | None = None

    def __enter__(self) -> _Screen:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        if self._keyboard is not None:
            loop.add_reader(self._keyboard, self._on_key)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        if self._keyboard is not None:
            loop.remove_reader(self._keyboard)
        loop.remove_signal_handler(signal.SIGTSTP)
        self._give_back()

    def show(self, mesh: _Mesh) -> None:
        """Puts a frame over the one before, cut to the terminal's present size."""
        size = shutil.get_terminal_size()
        lines = [*mesh.lines(size.columns, is_coloured=True)][: size.lines - 1]
        text = "".join(f"{line}{_REST_OF_LINE}\r\n" for line in lines)
        print(f"{_HOME}{text}{_REST_OF_SCREEN}", end="", flush=True)

    def _on_key(self) -> None:
        assert self._keyboard is not None
        keys = os.read(self._keyboard, 64)
        if not keys or b"q" in keys:
            self._stop.set()

    def _take(self) -> None:
        if self._keyboard is not None:
            self._before = termios.tcgetattr(self._keyboard)
            tty.setcbreak(self._keyboard)
        print(_ENTER, end="", flush=True)

    def _give_back(self) -> None:
        print(_LEAVE, end="", flush=True)
        if self._keyboard is not None and self._before is not None:
            termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._before)

    def _suspend(self) -> None:
        """Ctrl-Z: the shell gets its terminal, and this one is taken again on fg."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
