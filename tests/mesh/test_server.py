"""The server's edge: cancellation, sizes, health, reflection, ports and stopping."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mesh.errors import Unavailable
from mesh.process import StartupError
from mesh.server import ServiceServer
from protos import decode_pb2, gateway_pb2
from tests.support.toy_service import (
    DECODE,
    GENERATION,
    ToyServer,
    ToyServicer,
    no_telemetry,
    toy_server,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TIMEOUT_S = 20
CANCELLED = grpc.StatusCode.CANCELLED
NAMES = ("", "readiness", GENERATION, DECODE)


class Hanging:
    """Handlers that wait for ever and tell how they ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[BaseException | None] = asyncio.Future()

    async def wait(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended.set_result(error)
            raise

    async def abort(self, request: Any, context: Any) -> Any:
        await self.wait()

    async def generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield gateway_pb2.GenerateResponse()
        await self.wait()

    async def session(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        yield decode_pb2.SessionResponse()
        await self.wait()

    def servicer(self) -> ToyServicer:
        return ToyServicer(abort=self.abort, generate=self.generate, session=self.session)

    def call(self, toy: ToyServer, kind: str) -> Any:
        if kind == "unary":
            return toy.generation.Abort(gateway_pb2.AbortRequest(), timeout=TIMEOUT_S)
        if kind == "stream":
            return toy.generation.Generate(gateway_pb2.GenerateRequest(), timeout=TIMEOUT_S)
        return toy.decode.Session(timeout=TIMEOUT_S)


KINDS = pytest.mark.parametrize("kind", ["unary", "stream", "session"])


@KINDS
async def test_a_callers_cancel_reaches_the_handler_and_is_no_error(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = Hanging()
    async with toy_server(hanging.servicer()) as toy:
        with caplog.at_level(logging.INFO):
            call = hanging.call(toy, kind)
            if kind != "unary":
                await call.read()
            await asyncio.wait_for(hanging.started.wait(), TIMEOUT_S)
            call.cancel()
            error = await asyncio.wait_for(hanging.ended, TIMEOUT_S)
    assert isinstance(error, asyncio.CancelledError) and await call.code() is CANCELLED
    assert not caplog.records


@KINDS
async def test_a_callers_disappearance_reaches_the_handler(kind: str) -> None:
    hanging = Hanging()
    async with toy_server(hanging.servicer()) as toy:
        call = hanging.call(toy, kind)
        if kind != "unary":
            await call.read()
        await asyncio.wait_for(hanging.started.wait(), TIMEOUT_S)
        await toy.channel.close()
        error = await asyncio.wait_for(hanging.ended, TIMEOUT_S)
    assert isinstance(error, asyncio.CancelledError)


@KINDS
@pytest.mark.parametrize("late", ["raises", "writes"])
async def test_what_a_handler_does_after_its_caller_left_makes_no_noise(
    kind: str, late: str, caplog: pytest.LogCaptureFixture
) -> None:
    started, over = asyncio.Event(), asyncio.Event()

    async def linger(context: Any, response: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if late == "raises":
                raise Unavailable("given up") from None
            return response
        finally:
            over.set()

    async def abort(request: Any, context: Any) -> Any:
        return await linger(context, gateway_pb2.AbortResponse())

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        yield gateway_pb2.GenerateResponse()
        yield await linger(context, gateway_pb2.GenerateResponse())

    async def session(requests: Any, context: Any) -> AsyncIterator[Any]:
        yield decode_pb2.SessionResponse()
        yield await linger(context, decode_pb2.SessionResponse())

    hanging = Hanging()
    async with toy_server(ToyServicer(abort, generate, session)) as toy:
        with caplog.at_level(logging.INFO):
            call = hanging.call(toy, kind)
            if kind != "unary":
                await call.read()
            await asyncio.wait_for(started.wait(), TIMEOUT_S)
            call.cancel()
            await asyncio.wait_for(over.wait(), TIMEOUT_S)
            await toy.server.stop(TIMEOUT_S)
    assert not caplog.records, [record.getMessage() for record in caplog.records]


async def test_a_closed_stream_closes_the_handlers_generator() -> None:
    closed = asyncio.Event()

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield gateway_pb2.GenerateResponse()
        finally:
            closed.set()

    async with toy_server(ToyServicer(generate=generate)) as toy:
        call = toy.generation.Generate(gateway_pb2.GenerateRequest())
        await call.read()
        call.cancel()
        await asyncio.wait_for(closed.wait(), TIMEOUT_S)


def health(toy: ToyServer) -> Any:
    return health_pb2_grpc.HealthStub(toy.channel)


async def state(toy: ToyServer, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    return (await health(toy).Check(request, timeout=TIMEOUT_S)).status


async def test_alive_and_ready_are_told_apart() -> None:
    async with toy_server(ToyServicer()) as toy:
        assert await state(toy, "liveness") == SERVING
        assert [await state(toy, name) for name in NAMES] == [NOT_SERVING] * 4
        toy.server.set_ready(True)
        assert [await state(toy, name) for name in NAMES] == [SERVING] * 4
        toy.server.set_ready(False)
        assert [await state(toy, name) for name in NAMES] == [NOT_SERVING] * 4
        assert await state(toy, "liveness") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await state(toy, "nobody")
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND


async def test_the_last_word_on_readiness_stays() -> None:
    async with toy_server(ToyServicer()) as toy:
        watch = health(toy).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == NOT_SERVING
        for ready in (True, False, True, False, True):
            toy.server.set_ready(ready)
        while (await watch.read()).status != SERVING:
            pass
        assert [await state(toy, name) for name in NAMES] == [SERVING] * 4
        watch.cancel()


async def test_a_watch_hears_changes_and_does_not_hold_up_the_stop() -> None:
    async with toy_server(ToyServicer()) as toy:
        watch = health(toy).Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=60)
        assert (await watch.read()).status == NOT_SERVING
        toy.server.set_ready(True)
        assert (await watch.read()).status == SERVING
        await asyncio.wait_for(toy.server.stop(TIMEOUT_S * 10), TIMEOUT_S)
        assert (await watch.read()).status == NOT_SERVING
        assert not await watch.read(), "the stream ends"


async def test_reflection_lists_every_service_and_its_file() -> None:
    async with toy_server(ToyServicer()) as toy:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(toy.channel)  # pyright: ignore[reportArgumentType]
        request_type = reflection_pb2.ServerReflectionRequest
        call = stub.ServerReflectionInfo(timeout=TIMEOUT_S)
        await call.write(request_type(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert {GENERATION, DECODE, "grpc.health.v1.Health"} <= names
        await call.write(request_type(file_containing_symbol=GENERATION))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()


async def test_a_taken_port_is_a_clear_error() -> None:
    async with toy_server(ToyServicer()) as toy:
        port = int(toy.address.rsplit(":", 1)[1])
        second = ServiceServer(host="127.0.0.1", port=port, telemetry=no_telemetry())
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}"):
            await second.start()
        await second.stop(0)


async def test_stop_lets_live_calls_finish() -> None:
    proceed, entered = asyncio.Event(), asyncio.Event()

    async def abort(request: Any, context: Any) -> Any:
        entered.set()
        await proceed.wait()
        return gateway_pb2.AbortResponse(aborted=True)

    async with toy_server(ToyServicer(abort=abort)) as toy:
        live = asyncio.ensure_future(toy.generation.Abort(gateway_pb2.AbortRequest()))
        await asyncio.wait_for(entered.wait(), TIMEOUT_S)
        stopping = asyncio.ensure_future(toy.server.stop(TIMEOUT_S))
        proceed.set()
        assert (await live).aborted
        await asyncio.wait_for(stopping, TIMEOUT_S)


@KINDS
async def test_stop_ends_what_outlives_its_grace_with_a_status(kind: str) -> None:
    hanging = Hanging()
    async with toy_server(hanging.servicer()) as toy:
        call = hanging.call(toy, kind)
        if kind != "unary":
            await call.read()
        await asyncio.wait_for(hanging.started.wait(), TIMEOUT_S)
        await asyncio.wait_for(toy.server.stop(0.05), TIMEOUT_S)
        assert await asyncio.wait_for(call.code(), TIMEOUT_S) is not grpc.StatusCode.OK
        assert isinstance(await hanging.ended, asyncio.CancelledError)
