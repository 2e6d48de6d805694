"""Errors keep their meaning over a real connection, in both directions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from mesh import errors
from mesh.errors import FieldViolation, KvmeshError, from_rpc_error, invalid, to_rpc_status
from protos import decode_pb2, gateway_pb2
from tests.support.toy_service import ToyServer, ToyServicer, toy_server

KINDS = sorted({*errors._BY_CODE.values()}, key=lambda kind: kind.__name__)
TIMEOUT_S = 20


def failing(make: Callable[[], BaseException]) -> ToyServicer:
    """Every handler raises; streams after one message."""

    async def abort(request: Any, context: Any) -> Any:
        raise make()

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        yield gateway_pb2.GenerateResponse()
        raise make()

    async def session(requests: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            yield decode_pb2.SessionResponse()
            raise make()

    return ToyServicer(abort=abort, generate=generate, session=session)


async def unary(toy: ToyServer) -> None:
    await toy.generation.Abort(gateway_pb2.AbortRequest(), timeout=TIMEOUT_S)


async def streaming(toy: ToyServer) -> None:
    async for _ in toy.generation.Generate(gateway_pb2.GenerateRequest(), timeout=TIMEOUT_S):
        pass


async def session(toy: ToyServer) -> None:
    call = toy.decode.Session(timeout=TIMEOUT_S)
    await call.write(decode_pb2.SessionRequest())
    async for _ in call:
        pass


CALLS = pytest.mark.parametrize("call", [unary, streaming, session])


async def failure(call: Any, toy: ToyServer) -> KvmeshError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(toy)
    return from_rpc_error(raised.value)


@CALLS
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_kind_survives_the_wire(call: Any, kind: type[KvmeshError]) -> None:
    sent = kind(
        "größer als 5 %\nzwei Zeilen",
        reason="TOO_BIG",
        violations=[FieldViolation("sampling.top_p", "1.5 is above 1"), FieldViolation("a", "b")],
        retryable=True,
    )
    async with toy_server(failing(lambda: sent)) as toy:
        got = await failure(call, toy)
    assert type(got) is kind and str(got) == str(sent) and got.reason == "TOO_BIG"
    assert got.violations == sent.violations and got.retryable


async def test_a_sync_client_reads_the_same_details() -> None:
    async with toy_server(failing(lambda: invalid("prompt.text", "is empty"))) as toy:

        def call() -> KvmeshError:
            with grpc.insecure_channel(toy.address) as channel:
                abort = channel.unary_unary("/kvmesh.v1.GenerationService/Abort")
                with pytest.raises(grpc.RpcError) as raised:
                    abort(b"", timeout=TIMEOUT_S)
                return from_rpc_error(raised.value)

        got = await asyncio.to_thread(call)
    assert type(got) is errors.InvalidArgument and got.reason == "INVALID_FIELD"
    assert got.violations == (FieldViolation("prompt.text", "is empty"),) and not got.retryable


@CALLS
async def test_an_unknown_exception_is_internal_and_logged_once(
    call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with toy_server(failing(lambda: KeyError("secret"))) as toy:
        with caplog.at_level(logging.ERROR):
            got = await failure(call, toy)
        assert type(got) is errors.Internal and got.reason == "UNEXPECTED"
        assert "incident" in str(got) and "secret" not in str(got)
        (record,) = caplog.records
        assert str(got).rsplit(" ", 1)[1] in record.getMessage() and record.exc_info
        assert type(await failure(call, toy)) is errors.Internal, "the process lives"


@CALLS
async def test_an_error_out_of_a_task_group_keeps_its_meaning(call: Any) -> None:
    refused = errors.NotFound("no model", reason="NO_MODEL")
    async with toy_server(failing(lambda: ExceptionGroup("tasks", [refused]))) as toy:
        got = await failure(call, toy)
    assert type(got) is errors.NotFound and got.reason == "NO_MODEL"
    mixed = ExceptionGroup("tasks", [refused, KeyError("bug")])
    assert type(errors.domain_error(mixed)) is errors.Internal


@CALLS
async def test_a_leaked_cancellation_still_ends_the_call(call: Any) -> None:
    async with toy_server(failing(asyncio.CancelledError)) as toy:
        got = await failure(call, toy)
    assert type(got) is errors.Aborted and got.reason == "STOPPED" and got.retryable


@CALLS
async def test_a_peers_error_passes_through_with_its_details(call: Any) -> None:
    refused = errors.ResourceExhausted("queue is full", reason="QUEUE_FULL", retryable=True)
    async with toy_server(failing(lambda: refused)) as peer:

        async def abort(request: Any, context: Any) -> Any:
            await unary(peer)

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            await unary(peer)
            yield gateway_pb2.GenerateResponse()

        async def relay(requests: Any, context: Any) -> AsyncIterator[Any]:
            await streaming(peer)
            yield decode_pb2.SessionResponse()

        front = ToyServicer(abort=abort, generate=generate, session=relay)
        async with toy_server(front) as toy:
            got = await failure(call, toy)
    assert type(got) is errors.ResourceExhausted and got.reason == "QUEUE_FULL" and got.retryable


async def test_a_handlers_own_abort_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def abort(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "mine")

    async with toy_server(ToyServicer(abort=abort)) as toy:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary(toy)
    assert raised.value.code() == grpc.StatusCode.OUT_OF_RANGE and raised.value.details() == "mine"
    assert not caplog.records


async def test_a_huge_status_still_arrives() -> None:
    sent = errors.InvalidArgument(
        "ü" * 100_000,
        violations=[FieldViolation(f"ids[{i}]", "ß" * 3000) for i in range(1000)],
    )
    async with toy_server(failing(lambda: sent)) as toy:
        got = await failure(unary, toy)
    assert type(got) is errors.InvalidArgument and str(got).startswith("üüü")
    assert len(got.violations) >= 1 and got.violations[0].field == "ids[0]"


async def test_an_unreachable_peer_is_retryable_and_unavailable() -> None:
    async with toy_server(ToyServicer()) as toy:
        await toy.server.stop(0)
        got = await failure(unary, toy)
    assert type(got) is errors.Unavailable and got.reason == "UNAVAILABLE" and got.retryable


async def test_a_missing_method_and_a_passed_deadline_keep_their_codes() -> None:
    async def abort(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    async with toy_server(ToyServicer(abort=abort)) as toy:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await toy.channel.unary_unary("/kvmesh.v1.Nobody/Nothing")(b"")
        assert type(from_rpc_error(raised.value)) is errors.Unimplemented
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await toy.generation.Abort(gateway_pb2.AbortRequest(), timeout=0.05)
        assert type(from_rpc_error(raised.value)) is errors.DeadlineExceeded


def test_a_peers_cancelled_does_not_pass_for_the_callers() -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), details="bye"
    )
    assert type(errors.domain_error(error)) is errors.Unavailable
    assert type(from_rpc_error(error)) is errors.Cancelled


def test_garbage_details_do_not_hide_the_status() -> None:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), trailers, details="no such model"
    )
    got = from_rpc_error(error)
    assert type(got) is errors.NotFound and str(got) == "no such model"


def test_text_that_is_not_unicode_still_makes_a_status() -> None:
    assert to_rpc_status(errors.Internal("bad \udcff byte")).details == "bad ? byte"
