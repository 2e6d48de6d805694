"""Channels: sizes both ways, streams of every arity with a trace, reconnecting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from opentelemetry import trace

from mesh.channel import open_channel
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry
from protos import decode_pb2, gateway_pb2, gateway_pb2_grpc
from tests.support.toy_service import GENERATION, ToyServicer, no_telemetry, toy_server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TIMEOUT_S = 20


def recording() -> ToyServicer:
    """Keeps the traceparent of every call."""

    def note(context: Any) -> None:
        toy.seen.append(dict(context.invocation_metadata()).get("traceparent"))

    async def abort(request: Any, context: Any) -> Any:
        note(context)
        return gateway_pb2.AbortResponse()

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        note(context)
        yield gateway_pb2.GenerateResponse()

    async def session(requests: Any, context: Any) -> AsyncIterator[Any]:
        note(context)
        async for _ in requests:
            yield decode_pb2.SessionResponse()

    toy = ToyServicer(abort=abort, generate=generate, session=session)
    return toy


def within(telemetry: Telemetry, traceparent: str) -> Any:
    span = trace.get_current_span(telemetry.context(traceparent))
    return trace.use_span(span)


async def test_calls_of_every_arity_carry_the_trace() -> None:
    servicer = recording()
    async with toy_server(servicer) as toy:
        with within(no_telemetry(), PARENT):
            await toy.generation.Abort(gateway_pb2.AbortRequest())
            metadata = (("mine", "kept"),)
            call = toy.generation.Generate(gateway_pb2.GenerateRequest(), metadata=metadata)
            assert [message async for message in call]
            session = toy.decode.Session()
            await session.write(decode_pb2.SessionRequest())
            await session.read()
            await session.done_writing()
        await toy.generation.Abort(gateway_pb2.AbortRequest())
    assert servicer.seen == [PARENT, PARENT, PARENT, None]


async def test_a_call_can_be_made_with_requests_given_as_an_iterator() -> None:
    async with toy_server(recording()) as toy:
        requests = [decode_pb2.SessionRequest()] * 3
        assert len([message async for message in toy.decode.Session(iter(requests))]) == 3


async def test_a_message_larger_than_grpcs_default_passes() -> None:
    async with toy_server(ToyServicer()) as toy:
        request = gateway_pb2.AbortRequest(request_id="x" * (8 * 2**20))
        assert not (await toy.generation.Abort(request, timeout=TIMEOUT_S)).aborted


async def test_a_channel_finds_a_restarted_server() -> None:
    async def serve(port: int) -> tuple[ServiceServer, int]:
        server = ServiceServer(host="127.0.0.1", port=port, telemetry=no_telemetry())
        register = gateway_pb2_grpc.add_GenerationServiceServicer_to_server
        server.add(register, ToyServicer(), GENERATION)
        return server, await server.start()

    server, port = await serve(0)
    async with open_channel(f"127.0.0.1:{port}", no_telemetry()) as channel:
        stub = gateway_pb2_grpc.GenerationServiceStub(channel)  # pyright: ignore[reportArgumentType]
        await stub.Abort(gateway_pb2.AbortRequest(), timeout=TIMEOUT_S)
        await server.stop(0)
        state = channel.get_state()
        while state is grpc.ChannelConnectivity.READY:
            await asyncio.wait_for(channel.wait_for_state_change(state), TIMEOUT_S)
            state = channel.get_state()
        server, _ = await serve(port)
        await stub.Abort(gateway_pb2.AbortRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
        await server.stop(0)


async def test_without_telemetry_the_channel_is_grpcs_own() -> None:
    channel = open_channel("127.0.0.1:1")
    assert type(channel).__module__.startswith("grpc.")
    await channel.close()
