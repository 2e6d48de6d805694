"""The gateway's life: construct, serve, drain, close.

Owns the wiring of one gateway, in this process or in a test. Never parses flags.
"""

from __future__ import annotations

import asyncio
import logging

from mesh.discovery import Discovery
from mesh.process import announce_ready, settle_heap
from mesh.server import ServiceServer
from mesh.status import StatusServicer
from mesh.telemetry import Telemetry
from protos import gateway_pb2_grpc, status_pb2_grpc
from services.gateway.generation import GenerationServicer
from services.gateway.live_page import LivePage
from services.gateway.model_service import ModelServicer
from services.gateway.registry import Registry
from services.gateway.request import Backend
from services.gateway.router import Router
from services.gateway.settings import GatewaySettings
from services.gateway.status import MeshStatus
from services.gateway.stores import Stores
from services.gateway.tokenizer import Tokenizer

log = logging.getLogger("kvmesh.gateway")


class Gateway:
    """`start` listens, `serve` runs until told to stop, then drains and closes."""

    def __init__(
        self,
        settings: GatewaySettings,
        tokenizer: Tokenizer,
        telemetry: Telemetry,
        incarnation: str,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._is_draining = False
        self.router = _make_router(settings, telemetry)
        self.registry = Registry(settings.max_live_requests)
        self._discovery = Discovery(settings.kvstore)
        self._stores = Stores(self.router)
        backend = Backend(
            router=self.router,
            stores=self._stores,
            tokenizer=tokenizer,
            telemetry=telemetry,
            max_attempts=settings.max_attempts,
        )
        self._status = MeshStatus(self.router, self.registry, incarnation, lambda: self.is_ready)
        self._server = ServiceServer(
            host=settings.host,
            port=settings.port,
            telemetry=telemetry,
            max_message_bytes=settings.max_request_bytes,
        )
        self._admin = ServiceServer(
            host=settings.host, port=settings.admin_port, telemetry=telemetry
        )
        self._live_page = self._make_live_page()
        self.live_page_address = ""
        self._add_services(backend, tokenizer)

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken and can be served."""
        return self.router.is_ready and not self._is_draining

    def check(self) -> None:
        """Asserts that nothing is held anywhere for a request that has ended."""
        self.router.check(self.registry.num_requests)

    async def start(self) -> tuple[str, str]:
        """Listens and begins to look for instances; returns the public and the admin address."""
        host = self._settings.host
        address = f"{host}:{await self._server.start()}"
        admin_address = f"{host}:{await self._admin.start()}"
        self._status.address = address
        if self._live_page is not None:
            self.live_page_address = f"{host}:{await self._live_page.start()}"
            log.info("live page: http://%s", self.live_page_address)
        await self.router.start()
        await self._discovery.start(self.router.follow_kvstores)
        return address, admin_address

    async def serve(self, stop: asyncio.Event) -> None:
        """Keeps readiness true to the mesh until `stop`, then drains and closes."""
        address, _ = await self.start()
        readiness = asyncio.ensure_future(self._follow_readiness(address))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({readiness, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (readiness, stopped):
            task.cancel()
        await asyncio.wait({readiness, stopped})
        await self.close()
        if not readiness.cancelled():
            readiness.result()

    async def close(self) -> None:
        """Refuses new requests, finishes live ones within drain_s, ends everything."""
        self._is_draining = True
        self._server.set_ready(False)
        self._admin.set_ready(False)
        await self.registry.drain(self._settings.drain_s)
        await self._server.stop(1.0)
        await self._discovery.close()
        await self._stores.close()
        await self.router.close()
        if self._live_page is not None:
            await self._live_page.close()
        await self._admin.stop(0.5)

    async def _follow_readiness(self, address: str) -> None:
        is_announced = was_ready = False
        while True:
            if self.is_ready != was_ready:
                was_ready = self.is_ready
                self._server.set_ready(was_ready)
                self._admin.set_ready(was_ready)
            if was_ready and not is_announced:
                is_announced = True
                settle_heap()
                announce_ready(role="gateway", address=address, incarnation=self._incarnation)
            await self.router.changed()

    def _make_live_page(self) -> LivePage | None:
        settings = self._settings
        if settings.http_port is None:
            return None
        return LivePage(
            host=settings.host,
            port=settings.http_port,
            names=settings.http_hosts,
            snapshot=self._status.snapshot,
        )

    def _add_services(self, backend: Backend, tokenizer: Tokenizer) -> None:
        backend.telemetry.observe("peer_state", self.router.peer_states)
        self._server.add(
            gateway_pb2_grpc.add_GenerationServiceServicer_to_server,
            GenerationServicer(backend, self.registry),
            "kvmesh.v1.GenerationService",
        )
        self._server.add(
            gateway_pb2_grpc.add_ModelServiceServicer_to_server,
            ModelServicer(self.router, tokenizer),
            "kvmesh.v1.ModelService",
        )
        self._admin.add(
            status_pb2_grpc.add_StatusServiceServicer_to_server,
            StatusServicer(self._status.snapshot, self.check),
            "kvmesh.v1.StatusService",
        )


def _make_router(settings: GatewaySettings, telemetry: Telemetry) -> Router:
    return Router(
        model_name=settings.model_name or settings.model.resolve().name,
        prefills=settings.prefill,
        decodes=settings.decode,
        telemetry=telemetry,
        poll_s=settings.poll_s,
        lost_after_s=settings.lost_after_s,
        rank_wait_s=settings.rank_wait_s,
    )
