"""Every limit of the public contract, refused with the field's path; the request after it works."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from mesh.errors import KvmeshError, NotFound, from_rpc_error
from protos import common_pb2, gateway_pb2, status_pb2
from services.gateway.catalog import ServedModel, served_model
from services.gateway.seeds import sequence_seed
from services.gateway.validation import max_new_tokens, validate
from tests.services.gateway.fake_mesh import CONTEXT_LEN, EOS, VOCAB_SIZE, write_byte_tokenizer

MODEL = ServedModel(
    name="demo",
    architecture="FakeForCausalLM",
    context_len=CONTEXT_LEN,
    vocab_size=VOCAB_SIZE,
    fingerprint=b"f" * 32,
    eos_token_ids=(EOS,),
)
Request = gateway_pb2.GenerateRequest
Change = Callable[[Request], object]


def plain() -> Request:
    return Request(text="hello")


def number(name: str, value: float) -> tuple[str, Change, str]:
    group, field = name.split(".")

    def change(request: Request) -> None:
        setattr(getattr(request, group), field, value)

    return name, change, f"{value:g}"


def long_chat(request: Request) -> None:
    request.chat.messages.add(role="", content="x")


BAD: list[tuple[str, Change, str]] = [
    *[number("sampling.temperature", v) for v in (-0.5, 2.5, math.nan, math.inf)],
    *[number("sampling.top_p", v) for v in (0.0, 1.5, math.nan, -math.inf)],
    number("sampling.top_k", -1),
    *[number("sampling.min_p", v) for v in (-0.5, 1.5, math.nan)],
    *[number("sampling.presence_penalty", v) for v in (-2.5, 2.5, math.nan)],
    *[number("sampling.frequency_penalty", v) for v in (-2.5, 2.5, math.inf)],
    *[number("sampling.repetition_penalty", v) for v in (0.0, -1.0, 10.5, math.nan)],
    *[number("sampling.num_sequences", v) for v in (0, -1, 17)],
    *[number("stopping.max_new_tokens", v) for v in (0, -5)],
    number("stopping.min_new_tokens", -1),
    *[number("output.logprobs", v) for v in (-1, 21)],
    *[number("output.prompt_logprobs", v) for v in (-1, 21)],
    ("priority", lambda r: setattr(r, "priority", 101), "101"),
    ("priority", lambda r: setattr(r, "priority", -101), "-101"),
    ("request_id", lambda r: setattr(r, "request_id", "x" * 129), "129"),
    ("session_id", lambda r: setattr(r, "session_id", "x" * 129), "129"),
    ("cache_salt", lambda r: setattr(r, "cache_salt", "x" * 129), "129"),
    ("prompt", lambda r: r.ClearField("text"), "not set"),
    ("text", lambda r: setattr(r, "text", ""), "empty"),
    ("token_ids.ids", lambda r: r.token_ids.SetInParent(), "0"),
    ("token_ids.ids[1]", lambda r: r.token_ids.ids.extend([1, VOCAB_SIZE]), str(VOCAB_SIZE)),
    ("token_ids.ids", lambda r: r.token_ids.ids.extend([1] * CONTEXT_LEN), str(CONTEXT_LEN - 1)),
    ("chat.messages", lambda r: r.chat.SetInParent(), "0"),
    ("chat.messages[0].role", long_chat, "empty"),
    ("sampling.logit_bias[9999]", lambda r: r.sampling.logit_bias.update({9999: 1.0}), "9999"),
    ("sampling.logit_bias[3]", lambda r: r.sampling.logit_bias.update({3: 101.0}), "101"),
    ("sampling.logit_bias[3]", lambda r: r.sampling.logit_bias.update({3: math.nan}), "nan"),
    (
        "sampling.logit_bias",
        lambda r: r.sampling.logit_bias.update(dict.fromkeys(range(1025), 0.0)),
        "1025",
    ),
    (
        "sampling.allowed_token_ids",
        lambda r: r.sampling.allowed_token_ids.extend([0] * 4097),
        "4097",
    ),
    ("sampling.allowed_token_ids[0]", lambda r: r.sampling.allowed_token_ids.append(999), "999"),
    ("sampling.bad_token_ids", lambda r: r.sampling.bad_token_ids.extend([0] * 4097), "4097"),
    ("sampling.bad_token_ids[0]", lambda r: r.sampling.bad_token_ids.append(999), "999"),
    ("sampling.bad_token_ids", lambda r: r.sampling.bad_token_ids.extend(range(VOCAB_SIZE)), "0"),
    ("stopping.stop_strings", lambda r: r.stopping.stop_strings.extend(["x"] * 17), "17"),
    ("stopping.stop_strings[1]", lambda r: r.stopping.stop_strings.extend(["x", ""]), "0"),
    ("stopping.stop_strings[0]", lambda r: r.stopping.stop_strings.append("é" * 129), "258"),
    ("stopping.stop_token_ids", lambda r: r.stopping.stop_token_ids.extend([1] * 65), "65"),
    ("stopping.stop_token_ids[0]", lambda r: r.stopping.stop_token_ids.append(999), "999"),
]


@pytest.mark.parametrize(("field", "change", "value"), BAD, ids=lambda v: str(v)[:40])
def test_a_bad_field_is_named_with_value_and_limit(field: str, change: Change, value: str) -> None:
    request = plain()
    change(request)
    with pytest.raises(KvmeshError) as raised:
        validate(request, MODEL)
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = raised.value.violations
    assert violation.field == field and value in violation.description


def test_allowed_tokens_that_are_all_bad_leave_nothing_to_choose() -> None:
    request = plain()
    request.sampling.allowed_token_ids.extend([1, 2])
    request.sampling.bad_token_ids.extend([2, 1])
    with pytest.raises(KvmeshError, match=r"sampling\.allowed_token_ids"):
        validate(request, MODEL)


def test_allowed_tokens_that_all_end_the_sequence_contradict_min_new_tokens() -> None:
    request = plain()
    request.sampling.allowed_token_ids.extend([EOS, 5])
    request.stopping.stop_token_ids.append(5)
    validate(request, MODEL)
    request.stopping.min_new_tokens = 1
    with pytest.raises(KvmeshError, match=r"stopping\.min_new_tokens"):
        validate(request, MODEL)


def test_another_models_name_is_not_found() -> None:
    with pytest.raises(NotFound):
        validate(Request(text="x", model="other"), MODEL)
    assert validate(Request(text="x", model="demo"), MODEL).prompt.text == "x"


def test_defaults_are_filled_in() -> None:
    valid = validate(plain(), MODEL)
    sampling = valid.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.repetition_penalty == 1.0 and sampling.num_sequences == 1
    assert sampling.HasField("seed") and valid.skip_special_tokens and not valid.echo
    assert valid.eos_token_ids == (EOS,) and valid.request_id and valid.num_logprobs is None
    ignoring = plain()
    ignoring.stopping.ignore_eos = True
    ignoring.sampling.temperature = 0
    valid = validate(ignoring, MODEL)
    assert valid.eos_token_ids == () and valid.sampling.temperature == 0


def test_the_context_limits_what_was_asked_for_but_not_the_default() -> None:
    request = plain()
    assert max_new_tokens(validate(request, MODEL), 10, CONTEXT_LEN) == CONTEXT_LEN - 10
    request.stopping.max_new_tokens = CONTEXT_LEN - 10
    valid = validate(request, MODEL)
    assert max_new_tokens(valid, 10, CONTEXT_LEN) == CONTEXT_LEN - 10
    with pytest.raises(KvmeshError, match=rf"max_new_tokens: is {CONTEXT_LEN - 10}.* 189 "):
        max_new_tokens(valid, 11, CONTEXT_LEN)
    with pytest.raises(KvmeshError, match=rf"text: is {CONTEXT_LEN} tokens long.*199"):
        max_new_tokens(valid, CONTEXT_LEN, CONTEXT_LEN)
    with pytest.raises(KvmeshError, match="text: is 0 tokens long"):
        max_new_tokens(valid, 0, CONTEXT_LEN)
    request.stopping.max_new_tokens = 5
    request.stopping.min_new_tokens = 6
    with pytest.raises(KvmeshError, match=r"min_new_tokens: is 6.*5"):
        max_new_tokens(validate(request, MODEL), 10, CONTEXT_LEN)


def test_sequence_seeds_differ_and_the_first_is_the_requests() -> None:
    seeds = [sequence_seed(2**64 - 1, i) for i in range(16)]
    assert seeds[0] == 2**64 - 1 and len(set(seeds)) == 16
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_the_model_is_the_one_both_kinds_of_workers_hold() -> None:
    def worker(fingerprint: bytes, context_len: int) -> status_pb2.WorkerModel:
        return status_pb2.WorkerModel(fingerprint=fingerprint, context_len=context_len)

    a, b = b"a" * 32, b"b" * 32
    assert served_model("m", [worker(a, 9)], [worker(b, 9)]) is None
    both = served_model("m", [worker(a, 9), worker(b, 9)], [worker(b, 7), worker(b, 8)])
    assert both is not None and both.fingerprint == b and both.context_len == 7


async def test_refusals_reach_the_client_rich_and_the_next_request_works(make_rig: Any) -> None:
    rig = await make_rig()
    bad = Request(text="x" * CONTEXT_LEN)
    error = from_rpc_error(await rig.refusal(bad))
    assert error.violations[0].field == "text" and str(CONTEXT_LEN - 1) in str(error)
    hot = plain()
    hot.sampling.temperature = math.nan
    error = from_rpc_error(await rig.refusal(hot))
    assert error.violations[0].field == "sampling.temperature"
    unknown = await rig.refusal(Request(text="x", model="nope"))
    assert unknown.code() == grpc.StatusCode.NOT_FOUND
    assert rig.meters.totals("kvmesh.requests") == {("rejected",): 3}
    assert rig.meters.totals("kvmesh.requests.rejected") == {
        ("INVALID_FIELD",): 2,
        ("MODEL_NOT_FOUND",): 1,
    }
    good = Request(text="x", stopping=common_pb2.StoppingParams(max_new_tokens=3))
    assert len((await rig.generate(good)).tokens[0]) == 3


async def test_chat_without_a_template_is_refused(make_rig: Any, tmp_path: Any) -> None:
    write_byte_tokenizer(tmp_path, chat_template=None)
    rig = await make_rig(model=tmp_path)
    request = Request()
    request.chat.messages.add(role="user", content="hi")
    error = from_rpc_error(await rig.refusal(request))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT and error.violations[0].field == "chat"


async def test_chat_that_the_template_refuses_is_refused(make_rig: Any, tmp_path: Any) -> None:
    write_byte_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    rig = await make_rig(model=tmp_path)
    request = Request()
    request.chat.messages.add(role="user", content="hi")
    error = from_rpc_error(await rig.refusal(request))
    assert error.violations[0].field == "chat.messages" and "alternate" in str(error)
