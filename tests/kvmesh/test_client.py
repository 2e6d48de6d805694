"""The Python client against a scripted gateway."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator

import pytest

from kvmesh import (
    AlreadyExists,
    AsyncClient,
    Client,
    FinishReason,
    Internal,
    InvalidArgument,
    Unavailable,
)
from kvmesh.request import GenerateOptions, generate_request
from protos import common_pb2, gateway_pb2
from tests.kvmesh.fake_gateway import GREETING, FakeGateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.address) as client:
        yield client


def test_deltas_concatenate_to_the_result(client: Client) -> None:
    generation = client.generate(GREETING, logprobs=2)
    deltas = list(generation)
    result = generation.result()
    assert [delta.token_ids for delta in deltas] == [(0,), (1,)]
    assert "".join(delta.text for delta in deltas) == result.text == GREETING
    assert result.token_ids == (0, 1)
    assert result.sequences[0].finish_reason is FinishReason.LENGTH
    assert len(result.sequences[0].logprobs[1].top) == 2
    assert result.prompt.seed == 2**63 + 1


def test_usage_is_there_after_the_last_delta_and_not_before(client: Client) -> None:
    generation = client.generate(GREETING)
    next(generation)
    assert client.last_usage is None
    assert list(generation)
    assert client.last_usage is not None
    assert client.last_usage.num_cached_tokens == 2


def test_every_option_reaches_its_place_in_the_request() -> None:
    filled = {
        int: 1, float: 0.5, bool: True, str: "x",
    }  # fmt: skip
    for part, message in (
        ("sampling", common_pb2.SamplingParams),
        ("stopping", common_pb2.StoppingParams),
        ("output", gateway_pb2.OutputOptions),
        ("", gateway_pb2.GenerateRequest),
    ):
        for name, annotation in GenerateOptions.__annotations__.items():
            if name not in message.DESCRIPTOR.fields_by_name:
                continue
            kind = annotation.__forward_arg__
            values = {
                "Mapping[int, float]": {5: 1.0}, "Iterable[int]": [7], "Iterable[str]": ["s"],
            }  # fmt: skip
            value = values.get(kind) or {k.__name__: v for k, v in filled.items()}[kind]
            options: GenerateOptions = {name: value}  # type: ignore[misc]
            request = generate_request("p", None, options)
            target = getattr(request, part) if part else request
            assert getattr(target, name) == value, name


def test_options_cover_the_whole_contract() -> None:
    fields = {
        name
        for message in (
            common_pb2.SamplingParams,
            common_pb2.StoppingParams,
            gateway_pb2.OutputOptions,
        )
        for name in message.DESCRIPTOR.fields_by_name
    }
    fields |= {"request_id", "model", "priority", "session_id", "cache_salt"}
    assert set(GenerateOptions.__annotations__) == fields


def test_unset_scalars_stay_unset_so_that_the_gateway_defaults_apply() -> None:
    request = generate_request("p", None, {"temperature": 0.0})
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("stopping")


def test_token_ids_and_chat_fill_the_prompt(client: Client, gateway: FakeGateway) -> None:
    client.generate([5, 6, 7]).result()
    client.chat([{"role": "user", "content": "hi"}]).result()
    assert list(gateway.requests[0].token_ids.ids) == [5, 6, 7]
    assert gateway.requests[1].chat.messages[0].content == "hi"


def test_stop_string_is_reported(client: Client) -> None:
    sequence = client.generate("a b", stop_strings=["b"]).result().sequences[0]
    assert (sequence.finish_reason, sequence.stop) == (FinishReason.STOP_STRING, "b")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"stop_strings": "one string"}, "stopping.stop_strings"),
        ({"seed": -1}, "sampling.seed"),
        ({"logprobs": 1.5}, "output.logprobs"),
        ({"logit_bias": [1]}, "sampling.logit_bias"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_field(
    client: Client, options: GenerateOptions, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate("p", **options)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"seed": -1}, "sampling.seed", "-1; must be 0 to 18446744073709551615"),
        ({"seed": 2**64}, "sampling.seed", f"{2**64}; must be 0 to 18446744073709551615"),
        ({"max_new_tokens": 99999999999}, "stopping.max_new_tokens", "to 2147483647"),
        ({"priority": -(2**40)}, "priority", "must be -2147483648 to"),
        ({"bad_token_ids": [3, -1]}, "sampling.bad_token_ids[1]", "-1; must be 0 to 4294967295"),
        ({"logit_bias": {2**32: 1.0}}, "sampling.logit_bias[4294967296]", "0 to 4294967295"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_limits(
    options: GenerateOptions, field: str, words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        generate_request("p", None, options)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert words in violation.description


def test_a_token_id_out_of_range_is_named_with_its_place() -> None:
    with pytest.raises(InvalidArgument, match=r"token_ids\.ids\[2\]: -7; must be 0 to 4294967295"):
        generate_request([5, 6, -7], None, {})


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), 1e10])
async def test_a_timeout_that_is_no_deadline_is_refused(timeout_s: float) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(
            ValueError, match=f"timeout_s {re.escape(str(timeout_s))}: .*1000000000"
        ):
            kind("127.0.0.1:1", timeout_s=timeout_s)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match=r"max_tokens.*max_new_tokens"):
        generate_request("p", None, {"max_tokens": 3})  # type: ignore[typeddict-unknown-key]


def test_a_bad_chat_message_is_named(client: Client) -> None:
    with pytest.raises(InvalidArgument, match=r"chat.messages\[0\]"):
        client.chat([{"role": "user", "text": "hi"}])


def test_a_refused_field_keeps_its_path_and_reason(client: Client) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate("fail:temperature").result()
    assert caught.value.violations[0].field == "sampling.temperature"
    with pytest.raises(AlreadyExists) as live:
        client.generate("fail:live").result()
    assert live.value.reason == "REQUEST_LIVE"


def test_a_stream_that_ends_early_is_an_error(client: Client) -> None:
    with pytest.raises(Internal, match="without"):
        client.generate("short").result()


def test_nobody_there_is_unavailable() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        with Client(address) as client, pytest.raises(Unavailable):
            client.generate("p").result()


def test_leaving_the_block_cancels_the_request(client: Client, gateway: FakeGateway) -> None:
    with client.generate("hang") as generation:
        assert next(generation).text == "hang"
    assert gateway.is_abandoned.wait(10)


def test_models_tokens_and_abort(client: Client) -> None:
    assert client.models()[0].name == "demo"
    assert client.tokenize("ab") == [97, 98]
    assert client.tokenize(messages=[{"role": "user", "content": "c"}]) == [99]
    assert client.detokenize([97, 98]) == "ab"
    assert client.abort("live")
    assert not client.abort("gone")


async def test_async_client_streams_and_cancels(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        generation = client.generate(GREETING)
        assert [delta.text async for delta in generation] == ["héllo", " wörld"]
        assert (await generation.result()).text == GREETING
        assert client.last_usage is not None
        assert (await client.models())[0].name == "demo"
        assert await client.detokenize(await client.tokenize("ab")) == "ab"
        async with client.generate("hang") as hanging:
            await anext(hanging)
        assert await asyncio.to_thread(gateway.is_abandoned.wait, 10)
        with pytest.raises(InvalidArgument):
            await client.generate("fail:temperature").result()


async def test_cancelling_the_reader_cancels_the_request(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        generation = client.generate("hang")
        await anext(generation)
        reader = asyncio.create_task(anext(generation))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        generation.close()
        assert await asyncio.to_thread(gateway.is_abandoned.wait, 10)
