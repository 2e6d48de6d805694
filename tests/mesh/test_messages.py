"""Messages that are too long, or no messages at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from protos import decode_pb2, gateway_pb2
from tests.support.toy_service import ToyServicer, toy_server

TIMEOUT_S = 20.0


async def test_an_oversize_request_is_refused_with_both_sizes_and_the_process_lives() -> None:
    async with toy_server(ToyServicer(), max_message_bytes=1000) as toy:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await toy.generation.Abort(gateway_pb2.AbortRequest(request_id="x" * 5000))
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        details = raised.value.details() or ""
        assert "larger than max" in details and "1000" in details
        response = await toy.generation.Abort(gateway_pb2.AbortRequest(request_id="x"))
        assert not response.aborted


@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["utf-8", "wire"])
async def test_bytes_that_are_no_request_are_invalid_and_leave_no_traceback(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with toy_server(ToyServicer()) as toy:
        for method, kind in (("Abort", "unary_unary"), ("Generate", "unary_stream")):
            raw = getattr(toy.channel, kind)(f"/kvmesh.v1.GenerationService/{method}")
            call = raw(data, timeout=TIMEOUT_S)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await (call.read() if kind == "unary_stream" else call)
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            status = rpc_status.from_call(raised.value)  # pyright: ignore[reportArgumentType]
            assert status is not None and len(status.details) == 2
    assert not caplog.records


async def test_an_oversize_message_on_a_session_is_refused() -> None:
    async def session(requests: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            yield decode_pb2.SessionResponse()

    async with toy_server(ToyServicer(session=session), max_message_bytes=1000) as toy:
        call = toy.decode.Session(timeout=TIMEOUT_S)
        await call.write(decode_pb2.SessionRequest(cancel=decode_pb2.Cancel()))
        await call.read()
        big = decode_pb2.SessionRequest(admit=decode_pb2.Admit(traceparent="x" * 5000))
        await call.write(big)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_oversize_response_ends_the_call_with_both_sizes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        yield gateway_pb2.GenerateResponse(delta=gateway_pb2.Delta(text="x" * (65 * 2**20)))

    async with toy_server(ToyServicer(generate=generate)) as toy:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in toy.generation.Generate(gateway_pb2.GenerateRequest()):
                pass
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, raised.value.details()
    assert "larger than max" in (raised.value.details() or "") and not caplog.records
