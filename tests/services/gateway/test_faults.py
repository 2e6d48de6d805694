"""Peers that die, refuse or fall silent: every request ends, no token is lost or doubled."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tests.services.gateway.fake_mesh import as_text
from tests.services.gateway.streams import EXPECTED, NUM_TOKENS, read_deltas, request_for


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


async def test_a_silent_rank_is_given_up_and_its_requests_go_on(make_rig: Any) -> None:
    rig = await make_rig(num_decode=2)
    for rank in rig.decodes:
        rank.pause_after_steps = 6
    responses = aiter(rig.generation.Generate(request_for()))
    tokens = await read_deltas(responses, 7)
    silent, other = sorted(rig.decodes, key=lambda rank: -rank.num_steps)
    other.pause_after_steps = 0
    ranks = {rank.address: rank for rank in rig.gateway.router.decodes}
    ranks[silent.address].lose("silent for too long")
    assert tokens + await read_deltas(responses) == EXPECTED


async def test_a_silent_prefill_is_given_up_and_another_takes_over(make_rig: Any) -> None:
    rig = await make_rig(num_prefill=2)
    for prefill in rig.prefills:
        prefill.is_gated = True
    answer = asyncio.ensure_future(rig.generate(request_for()))
    arrivals = [asyncio.ensure_future(prefill.arrived.wait()) for prefill in rig.prefills]
    await asyncio.wait(arrivals, return_when=asyncio.FIRST_COMPLETED)
    silent, other = sorted(rig.prefills, key=lambda prefill: -prefill.num_calls)
    other.gate.set()
    known = {prefill.address: prefill for prefill in rig.gateway.router.prefills}
    known[silent.address].lose("silent for too long")
    assert (await answer).tokens[0] == EXPECTED
    for arrival in arrivals:
        arrival.cancel()


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
