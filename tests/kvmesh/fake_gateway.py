"""A gateway that answers from a script: the client's counterpart in these tests.

Text prompts are echoed word by word; `fail:REASON` fails as the real one would; `hang` sends one
delta and waits until the client is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from mesh.errors import AlreadyExists, invalid, to_rpc_status
from protos import (
    common_pb2,
    gateway_pb2,
    gateway_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

GREETING = "héllo wörld"


class FakeGateway(
    gateway_pb2_grpc.GenerationServiceServicer, gateway_pb2_grpc.ModelServiceServicer
):
    """Serves on a free loopback port until closed."""

    def __init__(self) -> None:
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.is_abandoned = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8))
        gateway_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        gateway_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        status_pb2_grpc.add_StatusServiceServicer_to_server(FakeStatus(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()

    def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateResponse]:
        self.requests.append(request)
        if request.text == "hang":
            context.add_callback(self.is_abandoned.set)
        if request.text == "fail:temperature":
            context.abort_with_status(
                to_rpc_status(invalid("sampling.temperature", "3 is above 2"))
            )
        if request.text == "fail:live":
            error = AlreadyExists("request_id 'a' is live", reason="REQUEST_LIVE")
            context.abort_with_status(to_rpc_status(error))
        yield _prompt_info(request)
        if request.text == "short":
            return
        words = (request.text or GREETING).split(" ")
        for index, word in enumerate(words):
            yield _delta(request, index, word if index == 0 else f" {word}")
            if request.text == "hang":
                self.is_abandoned.wait(30)
                return
        yield _finished(request)
        yield gateway_pb2.GenerateResponse(
            usage=gateway_pb2.Usage(
                num_prompt_tokens=3, num_cached_tokens=2, num_output_tokens=len(words), decode_s=0.5
            )
        )

    def Abort(  # noqa: N802
        self, request: gateway_pb2.AbortRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.AbortResponse:
        return gateway_pb2.AbortResponse(aborted=request.request_id == "live")

    def ListModels(  # noqa: N802
        self, request: gateway_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.ListModelsResponse:
        model = gateway_pb2.ModelInfo(name="demo", vocab_size=100)
        return gateway_pb2.ListModelsResponse(models=[model])

    def Tokenize(  # noqa: N802
        self, request: gateway_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.TokenizeResponse:
        text = request.text or request.chat.messages[0].content
        return gateway_pb2.TokenizeResponse(token_ids=map(ord, text))

    def Detokenize(  # noqa: N802
        self, request: gateway_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.DetokenizeResponse:
        return gateway_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))


class FakeStatus(status_pb2_grpc.StatusServiceServicer):
    """A gateway, and a decode rank that is not ready."""

    def GetStatus(  # noqa: N802
        self, request: status_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        gateway = status_pb2.InstanceStatus(role=status_pb2.ROLE_GATEWAY, ready=True)
        decode = status_pb2.InstanceStatus(
            role=status_pb2.ROLE_DECODE,
            address="127.0.0.1:7",
            detail="loading weights",
            counts=status_pb2.Counts(num_blocks_used=3, num_blocks=40, tokens_per_s=12.5),
            model=status_pb2.WorkerModel(name="demo", architecture="Qwen3ForCausalLM"),
        )
        return status_pb2.GetStatusResponse(instances=[gateway, decode])


def _prompt_info(request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(
        prompt_info=gateway_pb2.PromptInfo(
            request_id=request.request_id or "made-up",
            num_prompt_tokens=3,
            num_cached_tokens=2,
            seed=request.sampling.seed if request.sampling.HasField("seed") else 2**63 + 1,
        )
    )


def _delta(
    request: gateway_pb2.GenerateRequest, index: int, text: str
) -> gateway_pb2.GenerateResponse:
    delta = gateway_pb2.Delta(token_ids=[index], text=text)
    if request.output.HasField("logprobs"):
        token = common_pb2.TokenLogprob(token_id=index, logprob=-0.5, rank=1, text=text)
        delta.logprobs.add(chosen=token, top=[token] * request.output.logprobs)
    return gateway_pb2.GenerateResponse(delta=delta)


def _finished(request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateResponse:
    finished = gateway_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
    if request.stopping.stop_strings:
        finished.reason = common_pb2.FINISH_REASON_STOP_STRING
        finished.stop_string = request.stopping.stop_strings[0]
    return gateway_pb2.GenerateResponse(finished=finished)
