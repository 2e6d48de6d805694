"""What a request's trace says at the gateway: its attributes, its attempts, its phases.

Owns the spans and the log lines of one request's failures. Never decides anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator

import grpc

from mesh import spans
from mesh.errors import KvmeshError
from mesh.tracing import Tracing, Value
from protos import common_pb2
from services.gateway.ledger import Ledger
from services.gateway.validation import ValidRequest

log = logging.getLogger("kvmesh.gateway")

_PHASES = {span_type.name: span_type for span_type in (spans.HANDOVER, spans.FIRST_STEP)}
"""Those before the first token are spans of the workers, but for the gateway's own queue."""


class RequestTrace:
    """One request's. Made in the call that the client made, whose span it fills in."""

    def __init__(self, tracing: Tracing, valid: ValidRequest, model: str) -> None:
        self._tracing = tracing
        self._request_id = valid.request_id
        self._cause = ""
        self._root = tracing.here()
        if self._root.is_recording:
            self._root.set(_request_attributes(valid, model))

    @contextlib.contextmanager
    def attempt(self, span_type: spans.SpanType, address: str, number: int) -> Iterator[None]:
        """Around one try on the instance at host:port; its failure is the next one's cause."""
        attributes: dict[str, Value] = {spans.ATTEMPT: number}
        if self._tracing.is_on:
            attributes |= _server(address)
        if number > 1:
            attributes[spans.CAUSE] = self._cause
        with self._tracing.span(span_type, attributes=attributes) as span:
            try:
                yield
            except KvmeshError as error:
                self._cause = error.reason
                span.set({spans.RPC_STATUS: error.code.name})
                span.fail(error.reason)
                log.warning(
                    "request %s: %s on %s failed, attempt %d: %s",
                    *(self._request_id, span_type.name, address, number, error),
                )
                raise
            except asyncio.CancelledError:
                span.set({spans.RPC_STATUS: grpc.StatusCode.CANCELLED.name})
                raise
            span.set({spans.RPC_STATUS: grpc.StatusCode.OK.name})

    def phases(self, ledger: Ledger) -> None:
        """The gateway's own phases, from the times that the metrics are made of."""
        if not self._tracing.is_on:
            return
        if ledger.called_at:
            self._record(spans.QUEUE, ledger.arrived_at, ledger.called_at)
        for phase in ledger.phases():
            if span_type := _PHASES.get(phase.name):
                self._record(span_type, phase.began_at, phase.began_at + phase.duration_s)

    def end(
        self, state: str, ledger: Ledger, output_lens: list[int], reasons: Iterable[int]
    ) -> None:
        """The request is over; the call's span ends next. reasons: of the sequences that ended."""
        log.debug("request %s %s: %s tokens", self._request_id, state, output_lens)
        if not self._root.is_recording:
            return
        attributes: dict[str, Value] = {
            spans.STATE: state,
            spans.INPUT_TOKENS: ledger.num_prompt_tokens,
            spans.CACHED_TOKENS: ledger.num_cached_tokens,
            spans.OUTPUT_TOKENS: sum(output_lens),
            spans.FINISH_REASONS: [_reason(reason) for reason in reasons],
        }
        if ledger.first_token_at is not None:
            attributes[spans.FIRST_TOKEN_S] = ledger.first_token_at - ledger.arrived_at
            wire_s = (phase.duration_s for phase in ledger.phases() if phase.name == "wire")
            attributes[spans.WIRE_S] = sum(wire_s)
        self._root.set(attributes)

    def _record(self, span_type: spans.SpanType, began_at: float, ended_at: float) -> None:
        self._tracing.record(
            span_type, began_at=began_at, ended_at=ended_at, parent=self._root.context
        )


def _request_attributes(valid: ValidRequest, model: str) -> dict[str, Value]:
    """No stop strings, which are the client's words; no seed, which may not fit 63 bits."""
    sampling = valid.sampling
    attributes: dict[str, Value] = {
        spans.OPERATION: "chat" if valid.prompt.messages else "text_completion",
        spans.PROVIDER: "kvmesh",
        spans.MODEL: model,
        spans.RESPONSE_ID: valid.request_id,
        spans.TEMPERATURE: _short(sampling.temperature),
        spans.TOP_P: _short(sampling.top_p),
        spans.TOP_K: sampling.top_k,
        spans.PRESENCE_PENALTY: _short(sampling.presence_penalty),
        spans.FREQUENCY_PENALTY: _short(sampling.frequency_penalty),
        spans.CHOICE_COUNT: sampling.num_sequences,
    }
    if valid.max_new_tokens is not None:
        attributes[spans.MAX_TOKENS] = valid.max_new_tokens
    return attributes


def _short(value: float) -> float:
    """What the client wrote: a float of the wire has seven digits."""
    return float(f"{value:.7g}")


def _server(address: str) -> dict[str, Value]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return {spans.SERVER_ADDRESS: address}
    return {spans.SERVER_ADDRESS: host.strip("[]"), spans.SERVER_PORT: int(port)}


def _reason(reason: int) -> str:
    """A number that this gateway does not know stays one."""
    known = common_pb2.FinishReason.DESCRIPTOR.values_by_number.get(reason)
    return known.name.removeprefix("FINISH_REASON_").lower() if known else str(reason)
