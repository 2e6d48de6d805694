"""The rank that is chosen before prefill has finished: it is admitted to, or told that nothing
follows.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from protos import gateway_pb2
from tests.services.gateway.fake_decode import FakeDecode
from tests.services.gateway.streams import EXPECTED, PROMPT, read_deltas, request_for


async def _begin(rig: Any, **changes: Any) -> tuple[Any, FakeDecode]:
    """A call whose prefill is held before it finishes, and the rank that prefetches for it."""
    for prefill in rig.prefills:
        prefill.is_gated = True
    request = request_for()
    request.MergeFrom(gateway_pb2.GenerateRequest(**changes))
    call = rig.generation.Generate(request, timeout=20)
    waits = {asyncio.ensure_future(rank.prefetched.wait()): rank for rank in rig.decodes}
    done, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    for wait in rest:
        wait.cancel()
    return call, waits[done.pop()]


async def _idle(rig: Any) -> None:
    """Waits until no request lives; then nothing may be held anywhere."""
    await rig.gateway.registry._empty.wait()
    rig.gateway.check()


async def test_the_admission_follows_on_the_same_rank_and_handle(make_rig: Any) -> None:
    rig = await make_rig(num_decode=2)
    call, rank = await _begin(rig)
    assert not rank.admits
    rig.prefills[0].gate.set()
    assert await read_deltas(call) == EXPECTED
    assert [a.handle for a in rank.admits] == [p.handle for p in rank.prefetches]
    prefetch, admit = rank.prefetches[0], rank.admits[0]
    assert prefetch.prompt_token_ids == admit.prompt_token_ids and prefetch.request_id
    assert prefetch.handoff == admit.handoff and prefetch.fingerprint == admit.fingerprint
    await _idle(rig)


async def test_a_prefill_that_fails_late_ends_the_prefetch_and_another_begins(
    make_rig: Any,
) -> None:
    rig = await make_rig(num_prefill=2)
    for prefill in rig.prefills:
        prefill.failures_after_closing = [grpc.StatusCode.UNAVAILABLE]
    rig.prefills[1].failures_after_closing = []
    for _ in range(2):  # whichever is chosen first, the failing one is chosen once
        assert (await rig.generate(request_for())).tokens[0] == EXPECTED
    rank = rig.decodes[0]
    lost = {p.handle for p in rank.prefetches} - {a.handle for a in rank.admits}
    assert len(rank.prefetches) == 3 and len(lost) == 1
    assert lost == {c.handle for c in rank.cancels}
    await _idle(rig)


@pytest.mark.parametrize("leaving", ["cancel", "abort"])
async def test_a_client_that_leaves_ends_the_prefetch(make_rig: Any, leaving: str) -> None:
    rig = await make_rig()
    call, rank = await _begin(rig, request_id="one")
    if leaving == "cancel":
        call.cancel()
    else:
        await rig.generation.Abort(gateway_pb2.AbortRequest(request_id="one"))
    await rank.cancelled.wait()
    assert [c.handle for c in rank.cancels] == [rank.prefetches[0].handle] and not rank.admits
    call.cancel()
    await _idle(rig)


async def test_a_sequence_that_ends_with_its_first_token_ends_the_prefetch(make_rig: Any) -> None:
    rig = await make_rig()
    request = request_for()
    request.stopping.stop_strings.append(chr(EXPECTED[0]))
    answer = await rig.generate(request)
    assert answer.tokens[0] == EXPECTED[:1]
    rank = rig.decodes[0]
    await rank.cancelled.wait()
    assert [c.handle for c in rank.cancels] == [rank.prefetches[0].handle] and not rank.admits
    await _idle(rig)


async def test_a_rank_that_dies_with_a_prefetch_costs_only_that(make_rig: Any) -> None:
    rig = await make_rig(num_decode=2)
    call, rank = await _begin(rig)
    other = next(r for r in rig.decodes if r is not rank)
    sessions = {s.instance.address: s for s in rig.gateway.router._sessions}
    await rank.kill()
    await rig.until(lambda: not sessions[rank.address].is_open)
    rig.prefills[0].gate.set()
    assert await read_deltas(call) == EXPECTED
    assert len(other.admits) == 1 and other.admits[0].HasField("handoff") and not other.prefetches
    await _idle(rig)


async def test_a_rank_that_came_back_is_not_admitted_to_under_a_lost_handle(make_rig: Any) -> None:
    rig = await make_rig()
    call, rank = await _begin(rig)
    session = rig.gateway.router._sessions[0]
    await rank.kill()
    await rig.until(lambda: not session.is_open)
    await rank.start(int(rank.address.rsplit(":", 1)[1]))
    await rig.ready()
    rig.prefills[0].gate.set()
    assert await read_deltas(call) == EXPECTED
    assert rank.admits[0].handle != rank.prefetches[0].handle
    assert rank.admits[0].HasField("handoff")
    await _idle(rig)


async def test_prefetches_count_as_load(make_rig: Any) -> None:
    rig = await make_rig(num_decode=2)
    call, rank = await _begin(rig)
    loads = {i.address: i.num_outstanding for i in rig.gateway.router.decodes}
    other = next(r for r in rig.decodes if r is not rank)
    assert loads == {rank.address: len(PROMPT), other.address: 0}
    rig.prefills[0].gate.set()
    assert await read_deltas(call) == EXPECTED
    await _idle(rig)


async def test_without_a_ready_rank_the_admission_waits_as_ever(make_rig: Any) -> None:
    rig = await make_rig()
    rank, prefill = rig.decodes[0], rig.prefills[0]
    router = rig.gateway.router
    prefill.is_gated = True
    port = int(rank.address.rsplit(":", 1)[1])
    # The prefill's answer is held on its way, so that the rank is gone when it arrives.
    prefill.closing_gate.clear()
    call = rig.generation.Generate(request_for(), timeout=20)
    await prefill.arrived.wait()
    await rank.kill()
    await rig.until(lambda: not router._sessions[0].is_open)
    prefill.closing_gate.set()
    prefill.gate.set()
    first = await read_deltas(call, 1)
    assert first == EXPECTED[:1] and not rank.prefetches
    await rank.start(port)
    assert first + await read_deltas(call) == EXPECTED
    assert rank.admits[0].HasField("handoff") and not rank.prefetches
    await _idle(rig)
