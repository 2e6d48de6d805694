"""Fake prefill, decode and kvstore processes over real gRPC, for tests of the gateway.

A fake's next token is a function of everything before it and the seed, as in the real engine, so
any two ways of serving a request must agree.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from protos import (
    common_pb2,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

VOCAB_SIZE = 258
EOS = 256
CONTEXT_LEN = 200
FINGERPRINT = b"f" * 32
TAIL_KEY = b"t" * 32
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def next_token(tokens: Sequence[int], seed: int) -> int:
    """Printable ASCII, decided by all tokens so far and the seed."""
    data = repr((list(tokens), seed)).encode()
    return ord("a") + hashlib.blake2b(data, digest_size=2).digest()[0] % 26


def expected_tokens(prompt: Sequence[int], seed: int, num_tokens: int) -> list[int]:
    """The whole output of one sequence."""
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(next_token([*prompt, *output], seed))
    return output


def as_text(token_ids: Sequence[int]) -> str:
    """What the byte tokenizer makes of them."""
    return bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")


def write_byte_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level tokenizer whose token ids are the bytes themselves, with two special tokens."""
    path.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab.update({chr(256 + i): byte for i, byte in enumerate(others)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass
class FakeWorker:
    """What both fakes share: an address, a status, a switch."""

    role: status_pb2.Role
    fingerprint: bytes = FINGERPRINT
    ready: bool = True
    address: str = ""
    server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.register(self.server)
        status_pb2_grpc.add_StatusServiceServicer_to_server(_Status(self), self.server)
        bound = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self.server.start()

    async def kill(self) -> None:
        """Ends at once, cutting every call."""
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    def register(self, server: grpc.aio.Server) -> None:
        raise AssertionError(server)

    def status(self) -> status_pb2.InstanceStatus:
        return status_pb2.InstanceStatus(
            role=self.role,
            address=self.address,
            incarnation="fake",
            ready=self.ready,
            model=status_pb2.WorkerModel(
                name="fake",
                architecture="FakeForCausalLM",
                context_len=CONTEXT_LEN,
                vocab_size=VOCAB_SIZE,
                fingerprint=self.fingerprint,
                block_tokens=64,
                eos_token_ids=[EOS],
            ),
        )


class _Status(status_pb2_grpc.StatusServiceServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def GetStatus(self, request: object, context: object) -> status_pb2.GetStatusResponse:  # noqa: N802
        return status_pb2.GetStatusResponse(instances=[self._worker.status()])


def reason_for(token: int, num_output: int, request: Any) -> common_pb2.FinishReason:
    """The engine's rule, for the fakes."""
    if num_output > request.stopping.min_new_tokens:
        if token in request.eos_token_ids:
            return common_pb2.FINISH_REASON_EOS
        if token in request.stopping.stop_token_ids:
            return common_pb2.FINISH_REASON_STOP_TOKEN
    if num_output >= request.stopping.max_new_tokens:
        return common_pb2.FINISH_REASON_LENGTH
    return common_pb2.FINISH_REASON_UNSPECIFIED


def logprobs_for(token: int, request: Any) -> list[common_pb2.PositionLogprobs]:
    """One position's log probabilities, without texts, when the request asked."""
    if not request.HasField("logprobs"):
        return []
    one = common_pb2.TokenLogprob(token_id=token, logprob=-0.5, rank=0)
    return [common_pb2.PositionLogprobs(chosen=one, top=[one] * request.logprobs)]


@dataclass
class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServiceServicer):
    """Computes first tokens; can refuse, and can be held before or after it started."""

    role: status_pb2.Role = status_pb2.ROLE_PREFILL
    num_calls: int = 0
    num_cancelled: int = 0
    failures: list[grpc.StatusCode] = field(default_factory=list)
    failures_after_closing: list[grpc.StatusCode] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    is_gated: bool = False
    closing_gate: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.closing_gate.set()

    def register(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        self.num_calls += 1
        if self.failures:
            await context.abort(self.failures.pop(0), "told to fail")
        started = prefill_pb2.PrefillStarted(num_cached_tokens=3, queue_s=0.01)
        try:
            yield prefill_pb2.PrefillResponse(started=started)
            self.arrived.set()
            await self.closing_gate.wait()
            if request.stopping.max_new_tokens > 1:
                closing = prefill_pb2.PrefillClosing(handoff=_handoff(request))
                yield prefill_pb2.PrefillResponse(closing=closing)
            if self.is_gated:
                await self.gate.wait()
            if self.failures_after_closing:
                await context.abort(self.failures_after_closing.pop(0), "told to fail late")
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            self.ended.set()
            raise
        yield prefill_pb2.PrefillResponse(finished=_finished(request))


def _finished(request: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillFinished:
    finished = prefill_pb2.PrefillFinished(prefill_s=0.02, put_s=0.03)
    for state in request.sequences:
        token = next_token(request.prompt_token_ids, state.seed)
        finished.first_tokens.add(
            sequence_index=state.sequence_index,
            token_id=token,
            finish_reason=reason_for(token, 1, request),
            logprobs=next(iter(logprobs_for(token, request)), None),
        )
    if request.HasField("prompt_logprobs"):
        for token in request.prompt_token_ids[1:]:
            finished.prompt_logprobs.add(chosen=common_pb2.TokenLogprob(token_id=token))
    finished.handoff.CopyFrom(_handoff(request))
    return finished


def _handoff(request: prefill_pb2.PrefillRequest) -> common_pb2.Handoff:
    num_tokens = len(request.prompt_token_ids)
    return common_pb2.Handoff(tail_key=TAIL_KEY, num_tokens=num_tokens, identity=b"i" * 32)


@dataclass
class FakeStore(FakeWorker, kvstore_pb2_grpc.KvStoreServiceServicer):
    """Records discards."""

    role: status_pb2.Role = status_pb2.ROLE_KVSTORE
    discarded: list[bytes] = field(default_factory=list)
    has_discarded: asyncio.Event = field(default_factory=asyncio.Event)

    def register(self, server: grpc.aio.Server) -> None:
        kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(self, server)

    async def Discard(  # noqa: N802
        self, request: kvstore_pb2.DiscardRequest, context: Any
    ) -> kvstore_pb2.DiscardResponse:
        self.discarded.extend(request.keys)
        self.has_discarded.set()
        return kvstore_pb2.DiscardResponse(num_dropped=len(request.keys))
