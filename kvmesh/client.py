"""The Python client of a mesh's public port: `Client` blocks, `AsyncClient` awaits.

Owns the channel and its options. Every call has a deadline; failures are KvmeshError subclasses
that carry a reason and, for bad requests, the path of each bad field. Nothing is retried here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from kvmesh.answer import Usage
from kvmesh.generation import AsyncGeneration, Generation
from kvmesh.request import GenerateOptions, Message, Prompt, chat_prompt, generate_request
from mesh.errors import from_rpc_error
from protos import gateway_pb2, gateway_pb2_grpc

DEFAULT_ADDR = "127.0.0.1:50051"
GENERATE_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 1e9  # some way below where gRPC's 64-bit nanoseconds wrap round
MAX_MESSAGE_BYTES = 64 * 2**20
# A pool of its own, so that closing a client closes its connection; no retries behind our back.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def check_timeout(name: str, timeout_s: float) -> float:
    """The timeout; ValueError, with the name and the limit, for what is no deadline."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:  # NaN is neither
        raise ValueError(
            f"{name} {timeout_s}: give above 0 and at most {MAX_TIMEOUT_S:.0f} seconds"
        )
    return timeout_s


class _Requests:
    """Requests of the unary calls, and the last generation's usage."""

    def __init__(self) -> None:
        self._last: Generation | AsyncGeneration | None = None

    @property
    def last_usage(self) -> Usage | None:
        """Usage of the generation started last; None while it runs or if it failed."""
        return self._last.usage if self._last else None

    @staticmethod
    def _tokenize(
        text: str | None, messages: Sequence[Message] | None, add_special_tokens: bool
    ) -> gateway_pb2.TokenizeRequest:
        request = gateway_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
        if messages is not None:
            request.chat.CopyFrom(chat_prompt(messages))
        else:
            request.text = text or ""
        return request


class Client(_Requests):
    """A blocking client; threads may share it. Close it, or use it in a with block."""

    def __init__(self, addr: str = DEFAULT_ADDR, *, timeout_s: float = GENERATE_TIMEOUT_S) -> None:
        super().__init__()
        self._timeout_s = check_timeout("timeout_s", timeout_s)
        self._channel = grpc.insecure_channel(addr, options=CHANNEL_OPTIONS)
        self._generation = gateway_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = gateway_pb2_grpc.ModelServiceStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Continues a text or token ids; iterate the answer for deltas."""
        return self._start(generate_request(prompt, None, options))

    def chat(self, messages: Sequence[Message], **options: Unpack[GenerateOptions]) -> Generation:
        """Answers chat messages ({"role": ..., "content": ...}, oldest first)."""
        return self._start(generate_request(None, messages, options))

    def abort(self, request_id: str) -> bool:
        """Ends a live request; False when no live request has that id."""
        request = gateway_pb2.AbortRequest(request_id=request_id)
        return self._call(self._generation.Abort, request).aborted

    def models(self) -> list[gateway_pb2.ModelInfo]:
        """The models served."""
        return list(self._call(self._models.ListModels, gateway_pb2.ListModelsRequest()).models)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of a text or of chat messages."""
        request = self._tokenize(text, messages, add_special_tokens)
        return list(self._call(self._models.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; undecodable bytes appear as U+FFFD."""
        request = gateway_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return self._call(self._models.Detokenize, request).text

    def close(self) -> None:
        """Closes the connection; live generations of this client are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, request: gateway_pb2.GenerateRequest) -> Generation:
        generation = Generation(self._generation.Generate(request, timeout=self._timeout_s))
        self._last = generation
        return generation

    def _call(self, method: Any, request: object) -> Any:
        try:
            return method(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


class AsyncClient(_Requests):
    """As Client, on the running event loop; construct it inside a coroutine."""

    def __init__(self, addr: str = DEFAULT_ADDR, *, timeout_s: float = GENERATE_TIMEOUT_S) -> None:
        super().__init__()
        self._timeout_s = check_timeout("timeout_s", timeout_s)
        self._channel = grpc.aio.insecure_channel(addr, options=CHANNEL_OPTIONS)
        self._generation = gateway_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = gateway_pb2_grpc.ModelServiceStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGeneration:
        """Continues a text or token ids; `async for` the answer for deltas."""
        return self._start(generate_request(prompt, None, options))

    def chat(
        self, messages: Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
        """Answers chat messages ({"role": ..., "content": ...}, oldest first)."""
        return self._start(generate_request(None, messages, options))

    async def abort(self, request_id: str) -> bool:
        """Ends a live request; False when no live request has that id."""
        request = gateway_pb2.AbortRequest(request_id=request_id)
        return (await self._call(self._generation.Abort, request)).aborted

    async def models(self) -> list[gateway_pb2.ModelInfo]:
        """The models served."""
        request = gateway_pb2.ListModelsRequest()
        return list((await self._call(self._models.ListModels, request)).models)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of a text or of chat messages."""
        request = self._tokenize(text, messages, add_special_tokens)
        return list((await self._call(self._models.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """The text of token ids; undecodable bytes appear as U+FFFD."""
        request = gateway_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await self._call(self._models.Detokenize, request)).text

    async def close(self) -> None:
        """Closes the connection; live generations of this client are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _start(self, request: gateway_pb2.GenerateRequest) -> AsyncGeneration:
        generation = AsyncGeneration(self._generation.Generate(request, timeout=self._timeout_s))
        self._last = generation
        return generation

    async def _call(self, method: Any, request: object) -> Any:
        try:
            return await method(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
