"""Answers through a gateway over fake workers: content, order, stops, logprobs, usage."""

from __future__ import annotations

from typing import Any

import pytest

from protos import common_pb2, gateway_pb2
from services.gateway.seeds import sequence_seed
from tests.services.gateway.fake_mesh import TAIL_KEY, as_text, expected_tokens

PROMPT = b"Once upon a time"


def text_request(num_tokens: int, **fields: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        text=PROMPT.decode(),
        sampling=common_pb2.SamplingParams(seed=7),
        stopping=common_pb2.StoppingParams(max_new_tokens=num_tokens),
        **fields,
    )


async def test_the_stream_has_info_deltas_finish_and_usage_in_order(make_rig: Any) -> None:
    rig = await make_rig()
    answer = await rig.generate(text_request(20, request_id="mine"))
    tokens = expected_tokens(PROMPT, 7, 20)
    assert answer.tokens == {0: tokens} and answer.text == {0: as_text(tokens)}
    assert answer.events[0] == "prompt_info" and answer.events[-2:] == ["finished", "usage"]
    assert set(answer.events[1:-2]) == {"delta"}
    assert answer.info is not None and answer.info.request_id == "mine"
    assert answer.info.num_prompt_tokens == len(PROMPT)
    assert answer.info.num_cached_tokens == 3 and answer.info.seed == 7
    assert answer.finished[0].reason == common_pb2.FINISH_REASON_LENGTH
    usage = answer.usage
    assert usage is not None and usage.num_output_tokens == 20 and usage.num_steps == 19
    assert (usage.prefill_s, usage.put_s, usage.get_s) == (0.02, 0.03, 0.04)
    assert 0 < usage.queue_s <= usage.first_token_s and usage.decode_s > 0
    assert rig.gateway.registry.num_requests == 0


async def test_a_seed_is_drawn_and_reported_when_none_is_given(make_rig: Any) -> None:
    rig = await make_rig()
    request = text_request(5)
    request.sampling.ClearField("seed")
    answer = await rig.generate(request)
    assert answer.info is not None
    assert answer.tokens[0] == expected_tokens(PROMPT, answer.info.seed, 5)


async def test_every_sequence_has_its_own_seed_and_its_own_end(make_rig: Any) -> None:
    rig = await make_rig()
    request = text_request(12)
    request.sampling.num_sequences = 3
    answer = await rig.generate(request)
    for index in range(3):
        expected = expected_tokens(PROMPT, sequence_seed(7, index), 12)
        assert answer.tokens[index] == expected and answer.text[index] == as_text(expected)
        assert answer.finished[index].reason == common_pb2.FINISH_REASON_LENGTH
    assert answer.usage is not None and answer.usage.num_output_tokens == 36
    assert answer.usage.num_steps == 11


async def test_one_token_needs_no_decode_rank(make_rig: Any) -> None:
    rig = await make_rig()
    answer = await rig.generate(text_request(1))
    assert answer.tokens[0] == expected_tokens(PROMPT, 7, 1) and not rig.decodes[0].admits
    await rig.stores[0].has_discarded.wait()
    assert rig.stores[0].discarded == [TAIL_KEY]


async def test_a_pulled_tail_is_not_discarded(make_rig: Any) -> None:
    rig = await make_rig()
    await rig.generate(text_request(3))
    await rig.generate(text_request(1))  # its discard comes after any of the first
    await rig.stores[0].has_discarded.wait()
    assert len(rig.stores[0].discarded) == 1


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_sequence_at_the_rank(make_rig: Any, include: bool) -> None:
    rig = await make_rig()
    tokens = expected_tokens(PROMPT, 7, 60)
    text = as_text(tokens)
    stop = text[10:14]
    end = text.index(stop) + len(stop)
    request = text_request(60)
    request.stopping.stop_strings.extend(["never appears!", stop])
    request.stopping.include_stop_string = include
    answer = await rig.generate(request)
    assert answer.text[0] == text[: end if include else end - len(stop)]
    assert answer.tokens[0] == tokens[:end]
    assert answer.finished[0].reason == common_pb2.FINISH_REASON_STOP_STRING
    assert answer.finished[0].stop_string == stop
    await rig.decodes[0].cancelled.wait()
    assert not rig.decodes[0].live
    assert not rig.decodes[0].admits[0].stopping.stop_strings


async def test_one_of_several_sequences_stops_alone(make_rig: Any) -> None:
    rig = await make_rig()
    outputs = [expected_tokens(PROMPT, sequence_seed(7, i), 40) for i in range(2)]
    texts = [as_text(output) for output in outputs]
    stop = texts[0][5:9]
    assert stop not in texts[1]
    request = text_request(40)
    request.sampling.num_sequences = 2
    request.stopping.stop_strings.append(stop)
    answer = await rig.generate(request)
    assert answer.text == {0: texts[0][: texts[0].index(stop)], 1: texts[1]}
    assert answer.finished[1].reason == common_pb2.FINISH_REASON_LENGTH
    first, *others = rig.decodes[0].cancels
    assert first.HasField("sequence_index") and first.sequence_index == 0
    assert not any(cancel.HasField("sequence_index") for cancel in others)


async def test_a_stop_string_waits_for_min_new_tokens(make_rig: Any) -> None:
    rig = await make_rig()
    text = as_text(expected_tokens(PROMPT, 7, 150))
    stop = text[0]
    second = text.index(stop, 4)
    request = text_request(150)
    request.stopping.stop_strings.append(stop)
    request.stopping.min_new_tokens = 4
    answer = await rig.generate(request)
    assert answer.text[0] == text[:second]


async def test_a_stop_token_is_named(make_rig: Any) -> None:
    rig = await make_rig()
    tokens = expected_tokens(PROMPT, 7, 30)
    request = text_request(30)
    request.stopping.stop_token_ids.append(tokens[6])
    answer = await rig.generate(request)
    assert answer.finished[0].reason == common_pb2.FINISH_REASON_STOP_TOKEN
    assert answer.finished[0].stop_token_id == tokens[6]
    assert answer.tokens[0] == tokens[: tokens.index(tokens[6]) + 1]


async def test_logprobs_carry_token_texts(make_rig: Any) -> None:
    rig = await make_rig()
    request = text_request(4, output=gateway_pb2.OutputOptions(logprobs=2, prompt_logprobs=0))
    answer = await rig.generate(request)
    assert [p.chosen.token_id for p in answer.logprobs] == answer.tokens[0]
    assert "".join(p.chosen.text for p in answer.logprobs) == answer.text[0]
    assert all(len(p.top) == 2 and p.top[0].text for p in answer.logprobs)
    assert answer.info is not None
    assert "".join(p.chosen.text for p in answer.info.prompt_logprobs) == PROMPT[1:].decode()


async def test_echo_sends_the_prompt_first(make_rig: Any) -> None:
    rig = await make_rig()
    request = text_request(4, output=gateway_pb2.OutputOptions(echo=True))
    request.sampling.num_sequences = 2
    answer = await rig.generate(request)
    for index in range(2):
        expected = expected_tokens(PROMPT, sequence_seed(7, index), 4)
        assert answer.tokens[index] == [*PROMPT, *expected]
        assert answer.text[index] == PROMPT.decode() + as_text(expected)
    assert answer.usage is not None and answer.usage.num_output_tokens == 8


async def test_chat_goes_through_the_template(make_rig: Any) -> None:
    rig = await make_rig()
    request = text_request(3)
    request.chat.messages.add(role="user", content="hi")
    answer = await rig.generate(request)
    assert answer.tokens[0] == expected_tokens(b"user: hi\n", 7, 3)
