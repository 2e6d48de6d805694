"""A servicer whose handlers do what a test put in, and a server around it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from mesh.channel import open_channel
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry
from protos import decode_pb2_grpc, gateway_pb2, gateway_pb2_grpc

GENERATION = "kvmesh.v1.GenerationService"
DECODE = "kvmesh.v1.DecodeService"


async def echo(request: gateway_pb2.AbortRequest, context: Any) -> gateway_pb2.AbortResponse:
    """Answers that nothing was aborted."""
    return gateway_pb2.AbortResponse(aborted=False)


@dataclass
class ToyServicer(
    gateway_pb2_grpc.GenerationServiceServicer, decode_pb2_grpc.DecodeServiceServicer
):
    """GenerationService and DecodeService by three callables: unary, server stream, both stream."""

    abort: Callable[[Any, Any], Awaitable[Any]] = echo
    generate: Callable[[Any, Any], Any] | None = None
    session: Callable[[Any, Any], Any] | None = None
    seen: list[Any] = field(default_factory=list)

    async def Abort(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self.abort(request, context)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        assert self.generate is not None
        async for response in self.generate(request, context):
            yield response

    async def Session(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[Any]:
        assert self.session is not None
        async for response in self.session(request_iterator, context):
            yield response


@dataclass
class ToyServer:
    """A started server and a channel to it."""

    server: ServiceServer
    address: str
    channel: grpc.aio.Channel
    generation: gateway_pb2_grpc.GenerationServiceStub
    decode: decode_pb2_grpc.DecodeServiceStub


def no_telemetry() -> Telemetry:
    """Telemetry that does nothing."""
    return Telemetry.off()


@contextlib.asynccontextmanager
async def toy_server(
    servicer: ToyServicer, telemetry: Telemetry | None = None, **options: Any
) -> AsyncIterator[ToyServer]:
    """Serves `servicer` on a free port for the length of a with block."""
    telemetry = telemetry or no_telemetry()
    server = ServiceServer(host="127.0.0.1", port=0, telemetry=telemetry, **options)
    server.add(gateway_pb2_grpc.add_GenerationServiceServicer_to_server, servicer, GENERATION)
    server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, DECODE)
    address = f"127.0.0.1:{await server.start()}"
    channel = open_channel(address, telemetry)
    try:
        yield ToyServer(
            server,
            address,
            channel,
            gateway_pb2_grpc.GenerationServiceStub(channel),  # pyright: ignore[reportArgumentType]
            decode_pb2_grpc.DecodeServiceStub(channel),  # pyright: ignore[reportArgumentType]
        )
    finally:
        await channel.close()
        await server.stop(0)
