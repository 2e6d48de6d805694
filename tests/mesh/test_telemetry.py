"""Traces and metrics reach a real receiver; a missing or dead one changes nothing."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from typing import Any

import grpc
import pytest

from mesh import spans
from mesh.errors import Internal, invalid
from mesh.instruments import Instruments
from mesh.service_settings import ServiceSettings
from mesh.telemetry import Telemetry
from protos import gateway_pb2
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.toy_service import ToyServer, ToyServicer, no_telemetry, toy_server

WAIT_S = 20.0
ABORT = "kvmesh.v1.GenerationService/Abort"
CLOSE_S = 2.0


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    receiver.start()
    yield receiver
    receiver.close()


@pytest.fixture(params=["closed port", "black hole"])
def dead_endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address nobody listens on, or one where connections open and nothing is ever said."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "black hole":
            listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def start(role: str, endpoint: str, interval_ms: int = 5000) -> Telemetry:
    settings = ServiceSettings(otlp_endpoint=endpoint, otlp_interval_ms=interval_ms)
    return Telemetry.start(role=role, incarnation=f"{role}-1", settings=settings)


def relay_to(toy: ToyServer, telemetry: Telemetry) -> ToyServicer:
    """A front server that asks another, inside a span of its own."""

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        with telemetry.tracing.span(spans.QUEUE):
            await toy.generation.Abort(gateway_pb2.AbortRequest())
        yield gateway_pb2.GenerateResponse()

    return ToyServicer(generate=generate)


async def generate(toy: ToyServer) -> None:
    call = toy.generation.Generate(gateway_pb2.GenerateRequest())
    assert [message async for message in call]


async def test_one_trace_spans_two_servers(receiver: OtlpReceiver) -> None:
    back, front = start("prefill", receiver.endpoint), start("gateway", receiver.endpoint)
    async with (
        toy_server(ToyServicer(), back) as behind,
        toy_server(relay_to(behind, front), front) as toy,
    ):
        await generate(toy)
    back.close()
    front.close()
    named = {span.name: span for span in receiver.spans}
    root, choose = named[spans.GENERATE.name], named[spans.QUEUE.name]
    last = named[ABORT]
    assert root.parent_id == "" and choose.parent_id == root.span_id
    assert last.parent_id == choose.span_id
    assert {root.trace_id, choose.trace_id, last.trace_id} == {root.trace_id}
    assert root.service == "kvmesh-gateway" and last.service == "kvmesh-prefill"
    assert last.instance == "prefill-1" and last.attributes["rpc.system.name"] == "grpc"


async def test_a_trace_goes_on_from_a_traceparent_in_a_message(receiver: OtlpReceiver) -> None:
    telemetry = start("decode", receiver.endpoint)
    with telemetry.tracing.span(spans.PREFILL):
        carried = telemetry.traceparent()
    assert telemetry.traceparent() == ""
    context = telemetry.context(carried)
    with telemetry.tracing.span(spans.DECODE, parent=context):
        pass
    assert telemetry.context("") is None
    telemetry.close()
    (first,), (second,) = receiver.spans_named("prefill"), receiver.spans_named("decode")
    assert second.trace_id == first.trace_id and second.parent_id == first.span_id


@pytest.mark.parametrize(
    ("error", "code", "is_error"),
    [
        (Internal("broken"), "INTERNAL", True),
        (KeyError("bug"), "INTERNAL", True),
        (invalid("a", "b"), "INVALID_ARGUMENT", False),
    ],
    ids=["ours", "unknown", "theirs"],
)
async def test_a_failed_call_says_so_on_its_span(
    receiver: OtlpReceiver, error: Exception, code: str, is_error: bool
) -> None:
    async def abort(request: Any, context: Any) -> Any:
        raise error

    telemetry = start("gateway", receiver.endpoint)
    async with toy_server(ToyServicer(abort=abort), telemetry) as toy:
        with pytest.raises(grpc.aio.AioRpcError):
            await toy.generation.Abort(gateway_pb2.AbortRequest())
    telemetry.close()
    (span,) = receiver.spans_named(ABORT)
    assert span.is_error is is_error and span.attributes["rpc.response.status_code"] == code


async def test_metrics_arrive_while_the_process_lives(receiver: OtlpReceiver) -> None:
    telemetry = start("decode", receiver.endpoint, interval_ms=100)
    steps = telemetry.folds.series("decode_step_tokens")
    steps.record(7)
    name = "kvmesh.decode.step.tokens"
    await receiver.wait_for(lambda: bool(receiver.metric_points(name)), WAIT_S)
    steps.record(9)
    await receiver.wait_for(lambda: receiver.metric_points(name)[-1].count == 2, WAIT_S)
    point = receiver.metric_points(name)[-1]
    assert point.sum == 16 and point.bounds[0] == 1.0 and point.bounds[-1] == 8192.0
    assert point.service == "kvmesh-decode"
    telemetry.close()


def test_close_flushes_every_instrument_with_its_attributes(receiver: OtlpReceiver) -> None:
    telemetry = start("gateway", receiver.endpoint, interval_ms=60_000)
    for field in fields(Instruments):
        instrument = getattr(telemetry.instruments, field.name)
        record = instrument.add if hasattr(instrument, "add") else instrument.record
        record(1, {"reason": field.name})
    telemetry.observe("kv_blocks", lambda: [(5, {"state": "sealed", "tier": "memory"})])
    telemetry.close()
    telemetry.close()
    by_reason = {point.attributes.get("reason"): point for point in receiver.points}
    assert {field.name for field in fields(Instruments)} <= set(by_reason)
    assert by_reason["requests_rejected"].name == "kvmesh.requests.rejected"
    assert by_reason["time_to_first_token"].name == "gen_ai.server.time_to_first_token"
    (blocks,) = receiver.metric_points("kvmesh.kv.blocks")
    assert blocks.value == 5 and blocks.attributes == {"state": "sealed", "tier": "memory"}


async def test_without_an_endpoint_nothing_runs_and_traces_pass_through() -> None:
    before = threading.active_count()
    telemetry = no_telemetry()
    telemetry.instruments.requests.add(1, {"state": "completed"})
    telemetry.observe("kv_blocks", lambda: [])
    assert threading.active_count() == before and not telemetry.is_enabled
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    seen: list[str] = []

    async def abort(request: Any, context: Any) -> Any:
        seen.append(telemetry.traceparent())
        return gateway_pb2.AbortResponse()

    async with toy_server(ToyServicer(abort=abort), telemetry) as toy:
        await toy.generation.Abort(gateway_pb2.AbortRequest(), metadata=(("traceparent", parent),))
        await toy.generation.Abort(gateway_pb2.AbortRequest())
    assert seen == [parent, ""]
    telemetry.close()


async def test_a_dead_endpoint_slows_neither_start_nor_calls_nor_the_end(
    dead_endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        began = time.monotonic()
        telemetry = start("gateway", dead_endpoint, interval_ms=50)
        started_s = time.monotonic() - began
        async with toy_server(ToyServicer(), telemetry) as toy:
            calls = (toy.generation.Abort(gateway_pb2.AbortRequest()) for _ in range(300))
            began = time.monotonic()
            await asyncio.wait_for(asyncio.gather(*calls), WAIT_S)
            telemetry.instruments.requests.add(1, {"state": "done"})
            called_s = time.monotonic() - began
        began = time.monotonic()
        telemetry.close()
        closed_s = time.monotonic() - began
    assert started_s < CLOSE_S and called_s < WAIT_S / 2 and closed_s < CLOSE_S
    assert len(caplog.records) <= 1, [record.getMessage() for record in caplog.records]


def test_a_dead_endpoint_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as listener, caplog.at_level(logging.INFO):
        listener.bind(("127.0.0.1", 0))
        telemetry = start("toy", f"http://127.0.0.1:{listener.getsockname()[1]}", interval_ms=50)
        heard = threading.Event()
        handler = _Notice(heard)
        logging.getLogger("kvmesh.telemetry").addHandler(handler)
        telemetry.instruments.requests.add(1)
        assert heard.wait(WAIT_S)
        with telemetry.tracing.span(spans.QUEUE):
            pass
        telemetry.close()
        logging.getLogger("kvmesh.telemetry").removeHandler(handler)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "does not answer" in record.getMessage()


class _Notice(logging.Handler):
    def __init__(self, heard: threading.Event) -> None:
        super().__init__()
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.set()
