"""What a request's trace says at the gateway, without a mesh."""

from __future__ import annotations

import asyncio
import logging

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mesh import spans
from mesh.errors import Unavailable
from mesh.tracing import Tracing
from protos import common_pb2, gateway_pb2
from services.gateway.catalog import ServedModel
from services.gateway.ledger import Ledger
from services.gateway.trace import RequestTrace
from services.gateway.validation import ValidRequest, validate

MODEL = ServedModel(
    name="demo",
    architecture="FakeForCausalLM",
    context_len=64,
    vocab_size=512,
    fingerprint=b"f" * 32,
    eos_token_ids=(2,),
)


class Kept:
    """A tracing whose finished spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider.get_tracer("test"))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


def chat() -> ValidRequest:
    message = gateway_pb2.ChatMessage(role="user", content="hello")
    request = gateway_pb2.GenerateRequest(
        chat=gateway_pb2.ChatPrompt(messages=[message]),
        request_id="r1",
        sampling=common_pb2.SamplingParams(temperature=0.7, seed=2**64 - 1, num_sequences=2),
        stopping=common_pb2.StoppingParams(stop_strings=["secret"]),
    )
    return validate(request, MODEL)


def test_a_retry_names_the_failure_before_it(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    trace = RequestTrace(kept.tracing, chat(), "demo")
    lost = Unavailable("gone", reason="PREFILL_LOST")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Unavailable),
        trace.attempt(spans.PREFILL_CALL, "[::1]:7001", 1),
    ):
        raise lost
    with trace.attempt(spans.PREFILL_CALL, "10.0.0.2:7002", 2):
        pass
    first, second = kept.spans
    assert first.kind is second.kind is SpanKind.CLIENT
    assert first.status.status_code is StatusCode.ERROR
    assert dict(first.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": "kvmesh.v1.PrefillService/Prefill",
        "rpc.response.status_code": "UNAVAILABLE",
        "error.type": "PREFILL_LOST",
        "server.address": "::1",
        "server.port": 7001,
        "kvmesh.attempt": 1,
    }
    assert second.status.status_code is StatusCode.UNSET
    attributes = dict(second.attributes or {})
    assert attributes["kvmesh.attempt"] == 2 and attributes["kvmesh.cause"] == "PREFILL_LOST"
    assert attributes["rpc.response.status_code"] == "OK"
    (record,) = caplog.records
    assert "r1" in record.getMessage() and "attempt 1" in record.getMessage()


def test_a_cancelled_attempt_is_no_error() -> None:
    kept = Kept()
    trace = RequestTrace(kept.tracing, chat(), "demo")
    with (
        pytest.raises(asyncio.CancelledError),
        trace.attempt(spans.DECODE_CALL, "10.0.0.2:7002", 1),
    ):
        raise asyncio.CancelledError
    (span,) = kept.spans
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["rpc.response.status_code"] == "CANCELLED"


def test_a_chat_is_described_without_its_words_or_seed() -> None:
    kept = Kept()
    with kept.tracing.span(spans.GENERATE):
        trace = RequestTrace(kept.tracing, chat(), "demo")
        trace.end("aborted", Ledger(num_prompt_tokens=9), [3, 4], [5, 1])
    (root,) = kept.spans
    attributes = dict(root.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.temperature"] == 0.7
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.response.finish_reasons"] == ("aborted", "length")
    assert attributes["gen_ai.usage.output_tokens"] == 7
    assert "gen_ai.request.max_tokens" not in attributes
    assert set(attributes) <= set(spans.GENERATE.attributes)
    assert not [v for v in attributes.values() if v in ("hello", "secret", 2**64 - 1)]
