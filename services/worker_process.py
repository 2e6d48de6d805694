"""The life of a worker process: load, serve, drain, close. Shared by prefill and decode."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Protocol

from engine.scheduler import Scheduler
from mesh.logs import setup_logging
from mesh.process import (
    announce_ready,
    new_incarnation,
    run_service,
    settle_heap,
)
from mesh.server import ServiceServer
from mesh.settings import parse_settings
from mesh.status import StatusServicer
from mesh.telemetry import Telemetry
from protos import status_pb2, status_pb2_grpc
from services.worker import Worker
from services.worker_settings import WorkerSettings

log = logging.getLogger("kvmesh.worker")

SWITCH_INTERVAL_S = 0.00005  # see docs/decisions/0005-one-step-ahead.md


class WorkerServicer(Protocol):
    """What a worker's servicer tells its process."""

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        ...

    def check(self) -> None:
        """Asserts that what it keeps agrees with the engine."""
        ...


class Attach(Protocol):
    """Makes the role's servicer and adds it to the server; returns it and what ends its streams."""

    def __call__(
        self, server: ServiceServer, worker: Worker
    ) -> tuple[WorkerServicer, Callable[[], None]]:
        """Adds the servicer; called once, before the server starts."""
        ...


def run_worker(
    *,
    role: status_pb2.Role,
    name: str,
    scheduler: Callable[[WorkerSettings], Scheduler],
    attach: Attach,
) -> None:
    """Parses flags and runs the process until it is told to stop."""
    settings = parse_settings(WorkerSettings, f"python -m services.{name}")
    # The engine thread needs the interpreter between two operations: the loop must yield it soon.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    setup_logging(settings.log_format, settings.log_level, name)

    async def main(stop: asyncio.Event) -> None:
        incarnation = new_incarnation()
        telemetry = Telemetry.start(
            role=name,
            incarnation=incarnation,
            settings=settings,
        )
        worker = await Worker.start(
            settings=settings,
            role=name,
            scheduler=scheduler,
            telemetry=telemetry,
            incarnation=incarnation,
            progress=log.info,
        )
        server = ServiceServer(host=settings.host, port=settings.port, telemetry=telemetry)
        servicer, end_streams = attach(server, worker)
        await _serve(role, name, settings, worker, server, servicer, end_streams, stop)
        telemetry.close()

    run_service(main, die_with_parent=settings.die_with_parent)


async def _serve(
    role: status_pb2.Role,
    name: str,
    settings: WorkerSettings,
    worker: Worker,
    server: ServiceServer,
    servicer: WorkerServicer,
    end_streams: Callable[[], None],
    stop: asyncio.Event,
) -> None:
    address = ""
    ready = False

    def snapshot() -> status_pb2.InstanceStatus:
        return worker.status(role, address, servicer.num_requests, ready)

    server.add(
        status_pb2_grpc.add_StatusServiceServicer_to_server,
        StatusServicer(snapshot, lambda: _check(worker, servicer)),
        "kvmesh.v1.StatusService",
    )
    engine_loop = asyncio.ensure_future(worker.engine.run())
    engine_loop.add_done_callback(lambda _: stop.set())
    port = await server.start()
    address = f"{settings.host}:{port}"
    ready = True
    server.set_ready(True)
    settle_heap()
    announce_ready(role=name, address=address, incarnation=worker.incarnation)
    await stop.wait()
    ready = False
    server.set_ready(False)
    await _drain(servicer, settings.drain_s)
    end_streams()
    await server.stop(1.0)
    await worker.close()
    await engine_loop


def _check(worker: Worker, servicer: WorkerServicer) -> None:
    worker.engine.check()
    servicer.check()


async def _drain(servicer: WorkerServicer, drain_s: float) -> None:
    """Waits until no request is left, at most drain_s seconds."""
    deadline = asyncio.get_running_loop().time() + drain_s
    # A drain is rare and bounded: looking 20 times a second is simpler than an event per request.
    while servicer.num_requests and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
