"""ModelService: what is served, and its tokenizer.

Owns the edge to clients; never talks to the workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.errors import invalid
from protos import gateway_pb2, gateway_pb2_grpc
from services.gateway import limits
from services.gateway.router import Router
from services.gateway.tokenizer import Tokenizer
from services.gateway.validation import chat_messages, check_model

if TYPE_CHECKING:
    import grpc


class ModelServicer(gateway_pb2_grpc.ModelServiceServicer):
    """Serves the one model of this mesh."""

    def __init__(self, router: Router, tokenizer: Tokenizer) -> None:
        self._router = router
        self._tokenizer = tokenizer

    async def ListModels(  # noqa: N802 - gRPC method name
        self,
        request: gateway_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.ListModelsRequest, gateway_pb2.ListModelsResponse
        ],
    ) -> gateway_pb2.ListModelsResponse:
        """The model its workers agree on."""
        model = self._router.model
        return gateway_pb2.ListModelsResponse(
            models=[
                gateway_pb2.ModelInfo(
                    name=model.name,
                    architecture=model.architecture,
                    context_len=model.context_len,
                    vocab_size=model.vocab_size,
                    fingerprint=model.fingerprint.hex(),
                    eos_token_ids=model.eos_token_ids,
                )
            ]
        )

    async def Tokenize(  # noqa: N802 - gRPC method name
        self,
        request: gateway_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.TokenizeRequest, gateway_pb2.TokenizeResponse
        ],
    ) -> gateway_pb2.TokenizeResponse:
        """Token ids of a text or a conversation, as Generate would make them."""
        check_model(request.model, self._router.model)
        kind = request.WhichOneof("input")
        if kind == "text":
            special = not request.HasField("add_special_tokens") or request.add_special_tokens
            ids = await self._tokenizer.encode(request.text, add_special_tokens=special)
        elif kind == "chat":
            ids = await self._tokenizer.encode_chat(chat_messages(request.chat, "chat"))
        else:
            raise invalid("input", "is not set; one of text, chat is needed")
        return gateway_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(  # noqa: N802 - gRPC method name
        self,
        request: gateway_pb2.DetokenizeRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.DetokenizeRequest, gateway_pb2.DetokenizeResponse
        ],
    ) -> gateway_pb2.DetokenizeResponse:
        """The text of token ids."""
        model = self._router.model
        check_model(request.model, model)
        limits.check_token_ids("token_ids", request.token_ids, model.vocab_size)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        ids = list(request.token_ids)
        text = await self._tokenizer.decode_long(ids, skip_special_tokens=skip)
        return gateway_pb2.DetokenizeResponse(text=text)
