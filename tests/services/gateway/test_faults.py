"""Peers that die, refuse or vanish, and clients that leave: every request ends, nothing is doubled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos import common_pb2, gateway_pb2
from tests.services.gateway.fake_mesh import TAIL_KEY, as_text, expected_tokens

PROMPT = b"It was a dark night"
NUM_TOKENS = 40


def request_for(num_tokens: int = NUM_TOKENS, request_id: str = "") -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        request_id=request_id,
        text=PROMPT.decode(),
        sampling=common_pb2.SamplingParams(seed=3),
        stopping=common_pb2.StoppingParams(max_new_tokens=num_tokens),
    )


EXPECTED = expected_tokens(PROMPT, 3, NUM_TOKENS)


async def read_deltas(responses: AsyncIterator[Any], num_tokens: int = 10**9) -> list[int]:
    """Reads until at least num_tokens have come, or to the end."""
    tokens: list[int] = []
    async for response in responses:
        if response.HasField("delta"):
            tokens.extend(response.delta.token_ids)
        if len(tokens) >= num_tokens:
            break
    return tokens


async def test_a_rank_that_dies_loses_and_doubles_no_token(make_rig: Any) -> None:
    rig = await make_rig(num_decode=2)
    rig.decodes[0].die_after_steps = 11
    request = request_for()
    request.sampling.num_sequences = 2
    for _ in range(2):  # whichever rank is chosen first, the dying one is chosen once
        answer = await rig.generate(request)
        assert answer.tokens[0] == EXPECTED and answer.text[0] == as_text(EXPECTED)
        assert len(answer.tokens[1]) == NUM_TOKENS and answer.events.count("prompt_info") == 1
    assert rig.decodes[0].server is None, "the dying rank was never used"
    resumes = [a for a in rig.decodes[1].admits if len(a.sequences[0].output_token_ids) > 1]
    assert len(resumes) == 1
    assert not resumes[0].HasField("handoff"), "a resume must not use the hand-off again"


async def test_a_restarted_rank_takes_its_requests_back(make_rig: Any) -> None:
    rig = await make_rig()
    rank = rig.decodes[0]
    rank.pause_after_steps = 9
    responses = aiter(rig.generation.Generate(request_for()))
    tokens = await read_deltas(responses, 10)
    port = int(rank.address.rsplit(":", 1)[1])
    await rank.kill()
    rank.pause_after_steps = 0
    await rank.start(port)
    tokens += await read_deltas(responses)
    assert tokens == EXPECTED
    assert len(rank.admits) == 2 and not rank.admits[1].HasField("handoff")


async def test_no_rank_left_is_unavailable_after_a_bounded_wait(make_rig: Any) -> None:
    rig = await make_rig(rank_wait_s=0.3)
    rig.decodes[0].die_after_steps = 5
    error = await rig.refusal(request_for())
    assert error.code() == grpc.StatusCode.UNAVAILABLE and "decode rank" in (error.details() or "")


async def test_a_failed_prefill_is_tried_on_another_instance(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2)
    for prefill in rig.prefills:
        prefill.failures = [grpc.StatusCode.INTERNAL]
    rig.prefills[1].failures = []
    for _ in range(2):
        assert (await rig.generate(request_for())).tokens[0] == EXPECTED
    assert rig.prefills[0].num_calls >= 1 and not rig.prefills[0].failures


async def test_prefill_attempts_are_bounded(make_rig: Any) -> None:
    rig = await make_rig()
    rig.prefills[0].failures = [grpc.StatusCode.UNAVAILABLE] * 9
    error = await rig.refusal(request_for())
    assert error.code() == grpc.StatusCode.UNAVAILABLE and "3 times" in (error.details() or "")
    assert rig.prefills[0].num_calls == 3


async def test_a_peers_refusal_of_the_request_is_not_retried(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2)
    for prefill in rig.prefills:
        prefill.failures = [grpc.StatusCode.INVALID_ARGUMENT]
    error = await rig.refusal(request_for())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert sum(prefill.num_calls for prefill in rig.prefills) == 1


async def test_a_rejected_admission_goes_to_another_rank(make_rig: Any) -> None:
    rig = await make_rig(num_decode=2)
    rig.decodes[0].reject = grpc.StatusCode.RESOURCE_EXHAUSTED
    for _ in range(2):
        assert (await rig.generate(request_for())).tokens[0] == EXPECTED
    assert rig.decodes[0].admits


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


async def test_workers_of_different_fingerprints_are_never_paired(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2, num_decode=2)
    other = b"o" * 32
    rig.prefills[1].fingerprint = rig.decodes[1].fingerprint = other
    router = rig.gateway.router
    await rig.until(lambda: router.prefills[1].model and router.decodes[1].model
                    and router.prefills[1].model.fingerprint == other
                    and router.decodes[1].model.fingerprint == other)  # fmt: skip
    for _ in range(6):
        assert (await rig.generate(request_for(3))).tokens[0] == EXPECTED[:3]
    for rank in rig.decodes:
        assert all(admit.fingerprint == rank.fingerprint for admit in rank.admits)


async def test_a_session_keeps_its_instances(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2, num_decode=2)
    request = request_for(3)
    request.session_id = "alice"
    for _ in range(6):
        await rig.generate(request)
    assert sorted(prefill.num_calls for prefill in rig.prefills) == [0, 6]
    assert sorted(len(rank.admits) for rank in rig.decodes) == [0, 6]


async def test_equally_idle_instances_take_turns(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2, num_decode=2)
    for _ in range(6):
        await rig.generate(request_for(3))
    assert [prefill.num_calls for prefill in rig.prefills] == [3, 3]
    assert [len(rank.admits) for rank in rig.decodes] == [3, 3]
