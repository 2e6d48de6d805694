"""`kvmesh up`: a mesh on this machine, from the first log line to the drained exit.

Owns signals: the first SIGINT or SIGTERM drains and exits 0, the second kills and exits 130.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys

from kvmesh.client import DEFAULT_ADDR, AsyncClient
from kvmesh.console import LogPrinter, usage_line
from kvmesh.launcher import Launcher, LaunchError
from kvmesh.options import MeshOptions, PlanError
from kvmesh.plan import MeshPlan, connectable, plan_mesh
from mesh.errors import KvmeshError

DEFAULT_PROMPT = "In the beginning"
SAMPLE_TOKENS = 64
FORCED_EXIT = 130


def run_up(options: MeshOptions, sample: str | None) -> int:
    """Runs the mesh until told to stop; returns the exit code."""
    printer = LogPrinter(options.log_format)
    try:
        plan = plan_mesh(options)
    except PlanError as error:
        print(f"kvmesh up: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_Up(plan, printer, sample).run())


class _Up:
    def __init__(self, plan: MeshPlan, printer: LogPrinter, sample: str | None) -> None:
        self._plan = plan
        self._printer = printer
        self._sample = sample
        self._launcher = Launcher(plan, printer)
        self._stop = asyncio.Event()
        self._is_forced = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        exit_code = 0
        try:
            await self._until_stopped(self._serve())
        except LaunchError as error:
            print(f"kvmesh up: {error}", file=sys.stderr)
            exit_code = 1
        self._printer("kvmesh", "draining; Ctrl-C again to kill")
        await self._launcher.stop()
        self._printer("kvmesh", "stopped")
        return FORCED_EXIT if self._is_forced else exit_code

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._is_forced = True
            self._launcher.kill()
        self._stop.set()

    async def _until_stopped(self, work: object) -> None:
        """Runs a coroutine until it ends, fails or a signal arrives."""
        assert asyncio.iscoroutine(work)
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _serve(self) -> None:
        self._printer(
            "kvmesh", f"starting {', '.join(c.spec.name for c in self._launcher.children)}"
        )
        await self._launcher.start()
        if self._sample:
            await self._answer_sample(self._sample)
        self._announce()
        await self._launcher.wait()

    async def _answer_sample(self, prompt: str) -> None:
        address = connectable(self._plan.gateway.address)
        print(f"\n{prompt}", end="", flush=True)
        try:
            async with AsyncClient(address) as client:
                generation = client.generate(
                    prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.7, seed=1
                )
                async for delta in generation:
                    print(delta.text, end="", flush=True)
                result = await generation.result()
            print(f"\n{usage_line(result.usage, result.prompt.seed)}", flush=True)
        except KvmeshError as error:
            print(f"\nthe sample failed: {error.reason}: {error}", file=sys.stderr, flush=True)

    def _announce(self) -> None:
        address = connectable(self._plan.gateway.address)
        flag = "" if address == DEFAULT_ADDR else f" --addr {address}"
        prompt = shlex.quote(self._sample or DEFAULT_PROMPT)
        print(f"\nkvmesh serves at {address} (gRPC, kvmesh.v1.GenerationService). Try:")
        print(f"  {_program()} generate {prompt}{flag}")
        admin = connectable(self._plan.admin_address)
        print(f"Instances: {_program()} status --admin-addr {admin}")
        print(f"Decode steps: {_program()} top --admin-addr {admin}")
        print(f"live page: http://{connectable(self._plan.http_address)}")
        print("Ctrl-C drains and stops.", flush=True)


def _program() -> str:
    """How this command was called, so that the printed lines can be pasted into the same shell."""
    program = sys.argv[0]
    return shlex.quote(program) if program.endswith("kvmesh") else "python -m kvmesh"
