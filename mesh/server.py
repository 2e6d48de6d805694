"""The gRPC server of a process: one port, kvmesh's manners, health and reflection.

Owns the server's life. Handlers raise domain errors; `mesh.interceptors` turns them into status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mesh.channel import MAX_MESSAGE_BYTES
from mesh.health import HealthServicer
from mesh.interceptors import ServicerEdge
from mesh.process import StartupError
from mesh.telemetry import Telemetry


class ServiceServer:
    """A grpc.aio server. Build and `add` inside the loop, then `start`, `set_ready`, `stop`.

    Health names: "liveness", "readiness", "" and each service (see `mesh.health`). A message longer
    than max_message_bytes ends its call with RESOURCE_EXHAUSTED, naming both sizes.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        telemetry: Telemetry,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),  # a taken port is an error, not a second owner
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ]
        self._server = grpc.aio.server(interceptors=[ServicerEdge(telemetry)], options=options)
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._services: list[str] = []
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(
        self, register: Callable[[Any, Any], None], servicer: object, service_name: str
    ) -> None:
        """Adds a service (its generated add_..._to_server, its full name) before start."""
        register(servicer, self._server)
        self._services.append(service_name)

    async def start(self) -> int:
        """Binds and serves, live and not ready; returns the port. StartupError if it is taken."""
        names = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        address = f"{self._host}:{self._port}"
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {address}: the port is taken or the address is not this host's"
            ) from error
        await self._health.start(self._services)
        await self._server.start()
        return port

    def set_ready(self, ready: bool) -> None:
        """Says whether the process takes work; serving itself does not change."""
        self._health.set_ready(ready)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives live ones grace_s seconds, then cancels them."""
        self._health.set_ready(False)
        stopping = asyncio.ensure_future(self._server.stop(grace_s))
        await self._health.end_watches()
        await stopping
