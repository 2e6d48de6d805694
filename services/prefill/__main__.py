"""`python -m services.prefill`: wires the prefill process."""

from __future__ import annotations

from collections.abc import Callable

from engine.scheduler import PrefillScheduler
from mesh.server import ServiceServer
from protos import prefill_pb2_grpc, status_pb2
from services.prefill.servicer import PrefillServicer
from services.worker import Worker
from services.worker_process import run_worker
from services.worker_settings import WorkerSettings


def _scheduler(settings: WorkerSettings) -> PrefillScheduler:
    return PrefillScheduler(max_batch=settings.max_batch, chunk_tokens=settings.chunk_tokens)


def _attach(server: ServiceServer, worker: Worker) -> tuple[PrefillServicer, Callable[[], None]]:
    servicer = PrefillServicer(worker)
    server.add(
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
        servicer,
        "kvmesh.v1.PrefillService",
    )
    return servicer, lambda: None


if __name__ == "__main__":
    run_worker(role=status_pb2.ROLE_PREFILL, name="prefill", scheduler=_scheduler, attach=_attach)
