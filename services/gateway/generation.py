"""GenerationService: one client's stream per call.

Owns the edge between a client and its request: validation, admission, and that a client that is
gone ends the work at once. Never generates.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from mesh.errors import KvmeshError
from protos import gateway_pb2, gateway_pb2_grpc
from services.gateway.ledger import Ledger
from services.gateway.registry import Registry
from services.gateway.request import Backend, Request
from services.gateway.validation import validate

if TYPE_CHECKING:
    import grpc


class GenerationServicer(gateway_pb2_grpc.GenerationServiceServicer):
    """Serves clients over one mesh."""

    def __init__(self, backend: Backend, registry: Registry) -> None:
        self._backend = backend
        self._registry = registry

    async def Generate(  # noqa: N802 - gRPC method name
        self,
        request: gateway_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse
        ],
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Streams one answer; a slow client gets fewer, longer deltas."""
        ledger = Ledger()
        request_id, live = self._admit(request, ledger)
        with self._registry.live(request_id, live):
            context.add_done_callback(lambda _: live.close())  # pyright: ignore[reportArgumentType]
            live.start()
            blocked_s = 0.0
            try:
                while messages := await live.outbox.take():
                    began_at = time.monotonic()
                    for message in messages:
                        yield message
                    blocked_s += time.monotonic() - began_at
            finally:
                live.close()
                live.end_trace()
                self._backend.telemetry.instruments.stream_backpressure.record(blocked_s)

    async def Abort(  # noqa: N802 - gRPC method name
        self,
        request: gateway_pb2.AbortRequest,
        context: grpc.aio.ServicerContext[gateway_pb2.AbortRequest, gateway_pb2.AbortResponse],
    ) -> gateway_pb2.AbortResponse:
        """Ends a live request with ABORTED and usage."""
        return gateway_pb2.AbortResponse(aborted=self._registry.abort(request.request_id))

    def _admit(self, request: gateway_pb2.GenerateRequest, ledger: Ledger) -> tuple[str, Request]:
        try:
            self._registry.check_open(request.request_id)
            model = self._backend.router.model
            valid = validate(request, model)
        except KvmeshError as error:
            instruments = self._backend.telemetry.instruments
            instruments.requests_rejected.add(1, {"reason": error.reason})
            ledger.record(instruments, "rejected", [])
            raise
        return valid.request_id, Request(valid, model, self._backend, ledger)
