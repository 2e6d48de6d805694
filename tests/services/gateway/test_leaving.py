"""Clients that leave, abort or come too late: the work ends at once and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest

from protos import common_pb2, gateway_pb2
from tests.services.gateway.fake_mesh import TAIL_KEY
from tests.services.gateway.streams import EXPECTED, read_deltas, request_for


async def test_a_client_that_leaves_ends_the_sequence_and_the_tail(make_rig: Any) -> None:
    rig = await make_rig()
    rank = rig.decodes[0]
    rank.pause_after_steps, rank.num_pulled = 5, 0
    call = rig.generation.Generate(request_for())
    await read_deltas(call, 4)
    call.cancel()
    await rank.cancelled.wait()
    await rig.stores[0].has_discarded.wait()
    assert not rank.live and rig.stores[0].discarded == [TAIL_KEY]
    await rig.gateway.registry._empty.wait()


async def test_a_client_that_leaves_ends_the_prefill(make_rig: Any) -> None:
    rig = await make_rig()
    prefill = rig.prefills[0]
    prefill.is_gated = True
    call = rig.generation.Generate(request_for())
    await prefill.arrived.wait()
    call.cancel()
    await prefill.ended.wait()
    assert prefill.num_cancelled == 1
    await rig.gateway.registry._empty.wait()


async def test_a_deadline_ends_the_sequence(make_rig: Any) -> None:
    rig = await make_rig()
    rank = rig.decodes[0]
    rank.pause_after_steps = 3
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in rig.generation.Generate(request_for(), timeout=0.5):
            pass
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await rank.cancelled.wait()
    assert not rank.live


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_abort_finishes_with_usage(make_rig: Any, phase: str) -> None:
    rig = await make_rig()
    rank, prefill = rig.decodes[0], rig.prefills[0]
    rank.pause_after_steps = 3
    prefill.is_gated = phase == "prefill"
    call = rig.generation.Generate(request_for(request_id="one"))
    await (prefill.arrived if phase == "prefill" else rank.admitted).wait()
    answer = await rig.generation.Abort(gateway_pb2.AbortRequest(request_id="one"))
    assert answer.aborted
    events = [response async for response in call]
    assert events[0].HasField("prompt_info") and events[-1].HasField("usage")
    assert events[-2].finished.reason == common_pb2.FINISH_REASON_ABORTED
    await (prefill.ended if phase == "prefill" else rank.cancelled).wait()
    again = await rig.generation.Abort(gateway_pb2.AbortRequest(request_id="one"))
    assert not again.aborted


async def test_a_live_id_cannot_be_used_twice(make_rig: Any) -> None:
    rig = await make_rig()
    rig.prefills[0].is_gated = True
    call = rig.generation.Generate(request_for(request_id="same"))
    await rig.prefills[0].arrived.wait()
    error = await rig.refusal(request_for(request_id="same"))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    rig.prefills[0].gate.set()
    assert len([r async for r in call if r.HasField("usage")]) == 1
    assert (await rig.generate(request_for(request_id="same"))).usage is not None


async def test_more_than_the_live_limit_is_refused(make_rig: Any) -> None:
    rig = await make_rig(max_live_requests=1)
    rig.prefills[0].is_gated = True
    call = rig.generation.Generate(request_for())
    await rig.prefills[0].arrived.wait()
    error = await rig.refusal(request_for())
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    rig.prefills[0].gate.set()
    assert len([r async for r in call if r.HasField("usage")]) == 1


async def test_a_drain_finishes_live_requests_and_refuses_new_ones(make_rig: Any) -> None:
    rig = await make_rig(drain_s=10.0)
    prefill = rig.prefills[0]
    prefill.is_gated = True
    call = rig.generation.Generate(request_for())
    await prefill.arrived.wait()
    closing = asyncio.ensure_future(rig.gateway.registry.drain(10.0))
    await asyncio.sleep(0)
    error = await rig.refusal(request_for())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    prefill.gate.set()
    tokens = [t async for r in call if r.HasField("delta") for t in r.delta.token_ids]
    assert tokens == EXPECTED
    await closing


async def test_a_drain_that_takes_too_long_ends_with_a_status(make_rig: Any) -> None:
    rig = await make_rig()
    rig.decodes[0].pause_after_steps = 4
    responses = aiter(rig.generation.Generate(request_for()))
    await read_deltas(responses, 3)
    await rig.gateway.registry.drain(0.05)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await read_deltas(responses)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    await rig.decodes[0].cancelled.wait()


async def test_cancels_at_random_moments_leave_nothing_behind(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2, num_decode=2)
    rng = random.Random(5)

    async def run(index: int) -> None:
        call = rig.generation.Generate(request_for(1 + index % 20))
        responses = aiter(call)
        if index % 3 == 0:
            await read_deltas(responses, rng.randrange(6))
            call.cancel()
            return
        assert await read_deltas(responses) == EXPECTED[: 1 + index % 20]

    for first in range(0, 240, 40):
        await asyncio.gather(*(run(index) for index in range(first, first + 40)))
    await rig.gateway.registry._empty.wait()
    sessions = rig.gateway.router._sessions
    assert all(session.num_requests == 0 for session in sessions)
    assert all(instance.num_outstanding == 0 for instance in rig.gateway.router.instances)
    # A command sent after all cancels has been read: so have they.
    while any(rank.live for rank in rig.decodes):
        await rig.generate(request_for(2))
