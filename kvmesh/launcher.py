"""Runs a mesh's processes: start them, restart what crashes, drain them in order.

Owns the children, each in its own process group, so that Ctrl-C reaches only this process. Never
speaks gRPC and never looks inside a service: it reads the readiness line and sends signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable

from kvmesh.plan import MeshPlan, ServiceSpec

READY = re.compile(r"^kvmesh-ready role=(\S+) address=(\S+) incarnation=(\S+)$")
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
HEALTHY_S = 60.0
KILL_MARGIN_S = 5.0
MAX_LINE_BYTES = 2**20

Log = Callable[[str, str], None]


class LaunchError(Exception):
    """A service did not start; the message holds its last lines."""


class Child:
    """One supervised process, over all its lives. `log(name, line)` gets what it prints."""

    def __init__(self, spec: ServiceSpec, log: Log) -> None:
        self.spec = spec
        self.incarnation = ""
        self.num_restarts = 0
        self.ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._lines: deque[str] = deque(maxlen=30)

    @property
    def pid(self) -> int | None:
        """Process id of the present life; None when it is down."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def supervise(self) -> None:
        """Keeps the process up until told to stop; back-off doubles, a healthy minute resets it.

        Raises LaunchError when the process ends before it was ever ready.
        """
        backoff_s = FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            started_at = loop.time()
            status = describe(await self._live())
            if self._stopping.is_set():
                return
            if not self.incarnation:
                raise LaunchError(f"{self.spec.name} ended with {status} before it was ready")
            if loop.time() - started_at > HEALTHY_S:
                backoff_s = FIRST_BACKOFF_S
            self._log(self.spec.name, f"ended with {status}; starting again in {backoff_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            self.num_restarts += 1

    def terminate(self) -> None:
        """Asks the process to drain and end, for good."""
        self._stopping.set()
        if self.pid is not None and self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends the process and whatever it started, now and for good."""
        self._stopping.set()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def tail(self) -> str:
        """The last lines it printed."""
        return "\n".join(self._lines)

    async def _live(self) -> int:
        """Starts the process and follows it to its end; returns its exit status."""
        self._lines.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=MAX_LINE_BYTES,
            process_group=0,
        )
        try:
            if self._stopping.is_set():
                self._process.terminate()
            assert self._process.stdout is not None
            await self._follow(self._process.stdout)
            return await self._process.wait()
        except asyncio.CancelledError:
            self.kill()
            await self._process.wait()
            raise
        finally:
            self.ready.clear()

    async def _follow(self, stream: asyncio.StreamReader) -> None:
        while line := await _read_line(stream):
            text = line.decode(errors="replace").rstrip()
            if match := READY.match(text):
                self.incarnation = match.group(3)
                self._log(self.spec.name, f"ready at {match.group(2)}")
                self.ready.set()
            else:
                self._lines.append(text)
                self._log(self.spec.name, text)


class Launcher:
    """A whole mesh: `start`, then `wait` until told to stop, then `stop`."""

    def __init__(self, plan: MeshPlan, log: Log) -> None:
        self._plan = plan
        self._stages = [[Child(spec, log) for spec in stage] for stage in plan.stages]
        self._tasks: dict[Child, asyncio.Task[None]] = {}

    @property
    def children(self) -> list[Child]:
        """Every child: stores, workers, gateway."""
        return [child for stage in self._stages for child in stage]

    async def start(self) -> None:
        """Starts all at once (each waits for its peers by itself); returns when all are ready.

        Raises LaunchError when a service ends before it was ever ready.
        """
        for child in self.children:
            self._tasks[child] = asyncio.create_task(child.supervise())
        await asyncio.gather(*(self._until_ready(child) for child in self.children))

    async def wait(self) -> None:
        """Raises if a supervisor fails; normally the caller cancels it, which ends no child."""
        done, _ = await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Drains the gateway, then the workers, then the stores; kills what outlives its drain."""
        for stage in reversed(self._stages):
            live = [child for child in stage if child in self._tasks]
            for child in live:
                child.terminate()
            await self._join(live)

    def kill(self) -> None:
        """Ends everything now."""
        for child in self.children:
            child.kill()

    async def _until_ready(self, child: Child) -> None:
        ready = asyncio.create_task(child.ready.wait())
        try:
            await asyncio.wait({ready, self._tasks[child]}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await self._tasks[child]
        finally:
            ready.cancel()

    async def _join(self, children: Iterable[Child]) -> None:
        tasks = {self._tasks[child]: child for child in children}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._plan.drain_s + KILL_MARGIN_S)
        for task in late:
            tasks[task].kill()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def describe(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """One line; a line longer than the limit comes in pieces. Empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)
