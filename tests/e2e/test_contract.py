"""The public contract through the whole mesh: the stream's shape, sampling parameters, stops,
errors.
"""

from __future__ import annotations

import math

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos import common_pb2, gateway_pb2
from tests.support.generate import generate, greedy_request, sampled_request
from tests.support.mesh import Mesh

LENGTH, STOP_TOKEN, EOS, STOP_STRING = 1, 2, 3, 4


def _bad(field: str, **changes: object) -> tuple[str, dict[str, object]]:
    return field, changes


BAD_REQUESTS = [
    _bad("sampling.temperature", temperature=-0.1),
    _bad("sampling.temperature", temperature=2.5),
    _bad("sampling.temperature", temperature=math.nan),
    _bad("sampling.top_p", top_p=0.0),
    _bad("sampling.top_p", top_p=math.inf),
    _bad("sampling.top_k", top_k=-1),
    _bad("sampling.min_p", min_p=1.5),
    _bad("sampling.presence_penalty", presence_penalty=3.0),
    _bad("sampling.frequency_penalty", frequency_penalty=-3.0),
    _bad("sampling.repetition_penalty", repetition_penalty=0.0),
    _bad("sampling.num_sequences", num_sequences=0),
    _bad("sampling.num_sequences", num_sequences=17),
]


def _violations(error: grpc.RpcError) -> list[str]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, error
    fields: list[str] = []
    for detail in status.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            fields += [violation.field for violation in bad.field_violations]
    return fields


def _fails(mesh: Mesh, request: gateway_pb2.GenerateRequest, code: grpc.StatusCode) -> list[str]:
    with pytest.raises(grpc.RpcError) as raised:
        generate(mesh, request)
    assert raised.value.code() == code, raised.value
    return _violations(raised.value)


@pytest.mark.parametrize(("field", "changes"), BAD_REQUESTS)
def test_bad_sampling_names_the_field(
    wide_mesh: Mesh, field: str, changes: dict[str, float]
) -> None:
    request = greedy_request([1, 2], 4)
    for name, value in changes.items():
        setattr(request.sampling, name, value)
    assert _fails(wide_mesh, request, grpc.StatusCode.INVALID_ARGUMENT) == [field]
    assert len(generate(wide_mesh, greedy_request([1, 2], 4)).tokens[0]) == 4


def test_bad_prompts_are_refused(wide_mesh: Mesh) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    too_long = greedy_request([1] * 1024, 1)
    assert _fails(wide_mesh, too_long, invalid)
    assert _fails(wide_mesh, greedy_request([9999], 4), invalid) == ["token_ids.ids[0]"]
    assert _fails(wide_mesh, gateway_pb2.GenerateRequest(), invalid)
    unknown = greedy_request([1], 4)
    unknown.model = "no-such-model"
    _fails(wide_mesh, unknown, grpc.StatusCode.NOT_FOUND)


def test_a_live_request_id_is_refused_twice(wide_mesh: Mesh) -> None:
    first = greedy_request([1, 2, 3], 600)
    first.request_id = "twice"
    call = wide_mesh.generation.Generate(first, timeout=60)
    next(iter(call))
    second = greedy_request([1], 2)
    second.request_id = "twice"
    _fails(wide_mesh, second, grpc.StatusCode.ALREADY_EXISTS)
    call.cancel()


def test_stream_has_one_info_one_finish_and_usage_last(wide_mesh: Mesh) -> None:
    request = sampled_request(list(b"hello there"), 20, seed=9)
    request.sampling.num_sequences = 2
    events = [
        (response.WhichOneof("event"), response)
        for response in wide_mesh.generation.Generate(request, timeout=60)
    ]
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "prompt_info" and kinds[-1] == "usage"
    assert kinds.count("prompt_info") == kinds.count("usage") == 1
    assert kinds.count("finished") == 2
    assert events[0][1].prompt_info.num_prompt_tokens == 11
    assert events[0][1].prompt_info.seed == 9
    usage = events[-1][1].usage
    assert usage.num_output_tokens == 40 and usage.num_prompt_tokens == 11
    assert usage.first_token_s > 0 and usage.num_steps >= 19


def test_text_is_the_detokenised_whole(wide_mesh: Mesh) -> None:
    answer = generate(wide_mesh, sampled_request(list(range(60)), 120, seed=4))
    whole = wide_mesh.models.Detokenize(
        gateway_pb2.DetokenizeRequest(token_ids=answer.tokens[0])
    ).text
    assert answer.text[0] == whole


def test_stops(wide_mesh: Mesh) -> None:
    plain = generate(wide_mesh, greedy_request(list(b"abc"), 60))
    tokens, text = plain.tokens[0], plain.text[0]
    assert plain.finished[0].reason == LENGTH
    by_token = greedy_request(list(b"abc"), 60)
    by_token.stopping.stop_token_ids.append(tokens[10])
    answer = generate(wide_mesh, by_token)
    assert answer.finished[0].reason == STOP_TOKEN
    assert answer.tokens[0][-1] == tokens[10] == answer.finished[0].stop_token_id
    stop = text[8:11]
    by_string = greedy_request(list(b"abc"), 60)
    by_string.stopping.stop_strings.append(stop)
    answer = generate(wide_mesh, by_string)
    assert answer.finished[0].reason == STOP_STRING and answer.finished[0].stop_string == stop
    assert answer.text[0] == text[: text.index(stop)]


def test_bias_masks_and_logprobs(wide_mesh: Mesh) -> None:
    only = greedy_request([5, 6], 5)
    only.sampling.allowed_token_ids.extend([77])
    assert generate(wide_mesh, only).tokens[0] == [77] * 5
    forced = greedy_request([5, 6], 5)
    forced.sampling.logit_bias[42] = 100.0
    assert generate(wide_mesh, forced).tokens[0] == [42] * 5
    request = greedy_request([5, 6], 5)
    request.output.logprobs = 3
    request.output.prompt_logprobs = 2
    seen = 0
    for response in wide_mesh.generation.Generate(request, timeout=60):
        if response.WhichOneof("event") == "prompt_info":
            assert len(response.prompt_info.prompt_logprobs) == 1
            assert len(response.prompt_info.prompt_logprobs[0].top) == 2
        for token, entry in zip(response.delta.token_ids, response.delta.logprobs, strict=True):
            assert entry.chosen.token_id == token == entry.top[0].token_id
            assert entry.chosen.logprob <= 0 and entry.chosen.rank == 0 and len(entry.top) == 3
            seen += 1
    assert seen == 5


def test_chat_and_models(wide_mesh: Mesh) -> None:
    models = wide_mesh.models.ListModels(gateway_pb2.ListModelsRequest()).models
    assert len(models) == 1 and models[0].context_len == 1024
    chat = gateway_pb2.ChatPrompt(messages=[gateway_pb2.ChatMessage(role="user", content="hi")])
    ids = wide_mesh.models.Tokenize(gateway_pb2.TokenizeRequest(chat=chat)).token_ids
    request = greedy_request([], 4)
    request.chat.CopyFrom(chat)
    answer = generate(wide_mesh, request)
    assert answer.info is not None and answer.info.num_prompt_tokens == len(ids)
    assert answer.tokens == generate(wide_mesh, greedy_request(list(ids), 4)).tokens


def test_health_is_live_and_ready(wide_mesh: Mesh) -> None:
    stub = health_pb2_grpc.HealthStub(wide_mesh.channel)
    for name in ("", "liveness", "readiness", "kvmesh.v1.GenerationService"):
        status = stub.Check(health_pb2.HealthCheckRequest(service=name)).status  # pyright: ignore[reportAttributeAccessIssue]
        assert status == health_pb2.HealthCheckResponse.SERVING, name


def test_max_new_tokens_of_one_needs_no_decode(wide_mesh: Mesh) -> None:
    one = generate(wide_mesh, greedy_request([8, 9], 1))
    assert len(one.tokens[0]) == 1 and one.finished[0].reason == LENGTH
    assert one.tokens[0] == generate(wide_mesh, greedy_request([8, 9], 3)).tokens[0][:1]
    assert common_pb2.FinishReason.Name(one.finished[0].reason) == "FINISH_REASON_LENGTH"
