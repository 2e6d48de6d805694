"""`python -m services.decode`: wires the decode process."""

from __future__ import annotations

from collections.abc import Callable

from engine.scheduler import DecodeScheduler
from mesh.server import ServiceServer
from protos import decode_pb2_grpc, status_pb2
from services.decode.servicer import DecodeServicer
from services.worker import Worker
from services.worker_process import run_worker
from services.worker_settings import WorkerSettings


def _scheduler(settings: WorkerSettings) -> DecodeScheduler:
    return DecodeScheduler(max_batch=settings.max_batch, chunk_tokens=settings.chunk_tokens)


def _attach(server: ServiceServer, worker: Worker) -> tuple[DecodeServicer, Callable[[], None]]:
    servicer = DecodeServicer(worker)
    server.add(
        decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, "kvmesh.v1.DecodeService"
    )
    return servicer, servicer.end_sessions


if __name__ == "__main__":
    run_worker(role=status_pb2.ROLE_DECODE, name="decode", scheduler=_scheduler, attach=_attach)
