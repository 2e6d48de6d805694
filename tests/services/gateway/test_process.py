"""The gateway as a process: no torch, readiness, status of the mesh, drain, tokenizer services."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import common_pb2, gateway_pb2, status_pb2, status_pb2_grpc
from services.gateway.outbox import Outbox
from services.gateway.sequence import Sequence
from services.gateway.stop_strings import StopStrings
from services.gateway.tokenizer import MAX_INLINE_LEN, Tokenizer
from tests.services.gateway.fake_decode import FakeDecode
from tests.services.gateway.fake_mesh import EOS, FakePrefill, as_text

ROOT = Path(__file__).resolve().parents[3]


def test_the_gateway_never_imports_torch(model_dir: Path) -> None:
    code = (
        "import sys; import services.gateway.__main__\n"
        "from pathlib import Path; from services.gateway.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load(Path(sys.argv[1]))\n"
        "tokenizer._encode_chat([('user', 'hi')]); tokenizer.decode([1, 2])\n"
        "print([m for m in ('torch', 'triton', 'engine', 'kernels') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(model_dir)], cwd=ROOT, capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


async def test_long_texts_tokenize_like_short_ones(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    text = "long text " * MAX_INLINE_LEN
    assert await tokenizer.encode(text) == list(text.encode())
    assert await tokenizer.encode_chat([("user", text)]) == list(f"user: {text}\n".encode())


async def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make_rig()
    monkeypatch.setattr(Tokenizer, "_encode", lambda *_: pytest.fail("was tokenized"))
    for field, request in (
        ("text", gateway_pb2.GenerateRequest(text="x" * 2**20)),
        ("chat.messages", gateway_pb2.GenerateRequest(chat=as_chat("y" * 2**20))),
    ):
        error = await rig.refusal(request)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"{field}: is 1048576 bytes long" in (error.details() or "")
    too_long = gateway_pb2.GenerateRequest(text="x" * (5 * 2**20))
    assert (await rig.refusal(too_long)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def as_chat(content: str) -> gateway_pb2.ChatPrompt:
    return gateway_pb2.ChatPrompt(messages=[gateway_pb2.ChatMessage(role="user", content=content)])


def test_a_client_that_does_not_read_gets_one_long_delta(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    sequence = Sequence(
        index=0,
        seed=1,
        detokenizer=tokenizer.detokenizer(skip_special_tokens=True),
        stop_strings=StopStrings([], include=False),
        min_new_tokens=0,
        token_text=tokenizer.token_text,
    )
    outbox = Outbox()
    outbox.attach([sequence])
    ids = list("héllo wörld".encode())
    for token_id in ids:
        sequence.push([token_id], [], common_pb2.FINISH_REASON_UNSPECIFIED)
    sequence.push([EOS], [], common_pb2.FINISH_REASON_EOS)
    outbox.close(gateway_pb2.Usage(num_output_tokens=12))
    delta, finished, usage = asyncio.run(outbox.take())
    assert list(delta.delta.token_ids) == [*ids, EOS] and delta.delta.text == as_text(ids)
    assert finished.finished.stop_token_id == EOS and usage.usage.num_output_tokens == 12


async def test_models_and_tokenizer_services(make_rig: Any) -> None:
    rig = await make_rig()
    (model,) = (await rig.models.ListModels(gateway_pb2.ListModelsRequest())).models
    assert model.name == "fake" and model.architecture == "FakeForCausalLM"
    assert list(model.eos_token_ids) == [EOS] and model.fingerprint == (b"f" * 32).hex()
    tokenized = await rig.models.Tokenize(gateway_pb2.TokenizeRequest(text="abc"))
    assert list(tokenized.token_ids) == [97, 98, 99]
    chat = gateway_pb2.TokenizeRequest()
    chat.chat.messages.add(role="user", content="a")
    assert bytes((await rig.models.Tokenize(chat)).token_ids) == b"user: a\n"
    ids = [*"é".encode(), EOS]
    plain = await rig.models.Detokenize(gateway_pb2.DetokenizeRequest(token_ids=ids))
    assert plain.text == "é"
    for bad in (
        rig.models.Detokenize(gateway_pb2.DetokenizeRequest(token_ids=[9999])),
        rig.models.Tokenize(gateway_pb2.TokenizeRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await bad
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_status_tells_about_the_whole_mesh(make_rig: Any) -> None:
    rig = await make_rig()
    await rig.until(lambda: rig.gateway.router.kvstores[0].is_ready)
    async with grpc.aio.insecure_channel(rig.admin_address) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        answer = await stub.GetStatus(status_pb2.GetStatusRequest())
    roles = [instance.role for instance in answer.instances]
    assert roles == [
        status_pb2.ROLE_GATEWAY,
        status_pb2.ROLE_PREFILL,
        status_pb2.ROLE_DECODE,
        status_pb2.ROLE_KVSTORE,
    ]
    assert all(instance.ready for instance in answer.instances)
    assert answer.instances[0].address == rig.address and answer.instances[0].counts.num_fds > 0
    with pytest.raises(grpc.aio.AioRpcError) as raised:  # never on the public port
        stub = status_pb2_grpc.StatusServiceStub(rig.channel)
        await stub.GetStatus(status_pb2.GetStatusRequest())
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_dead_instance_shows_as_unreachable(make_rig: Any) -> None:
    rig = await make_rig()
    await rig.prefills[0].kill()
    await rig.until(lambda: not rig.gateway.router.is_ready)
    status = rig.gateway.router.prefills[0].status
    assert not status.ready and "unreachable" in status.detail
    assert status.address == rig.prefills[0].address


async def test_nothing_stays_behind_on_the_loop(make_rig: Any) -> None:
    rig = await make_rig()
    request = gateway_pb2.GenerateRequest(
        text="x", stopping=common_pb2.StoppingParams(max_new_tokens=5)
    )
    await rig.generate(request)
    for _ in range(20):
        await rig.generate(request)
    await rig.gateway.registry._empty.wait()
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    assert "Request._run" not in names and "Generate" not in names
    assert all(session.num_requests == 0 for session in rig.gateway.router._sessions)
    assert all(i.num_outstanding == 0 for i in rig.gateway.router.instances)


async def test_the_process_serves_and_drains_with_exit_code_0(model_dir: Path) -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    await prefill.start()
    await decode.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.gateway", "--model", str(model_dir), "--log-level", "warning"),
        *("--prefill", prefill.address, "--decode", decode.address),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().split()
        assert line[:2] == ["kvmesh-ready", "role=gateway"]
        async with grpc.aio.insecure_channel(line[2].removeprefix("address=")) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for service in ("", "liveness", "readiness", "kvmesh.v1.GenerationService"):
                state = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert state.status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await prefill.kill()
        await decode.kill()
