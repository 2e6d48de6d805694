"""A request's trace as a tree, for tests and benchmarks of spans.

Owns who is whose parent; never waits.
"""

from __future__ import annotations

from collections.abc import Iterator

from mesh import spans
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan

FIRST_TOKEN_PARTS = ("queue", "lookup", "get", "verify", "prefill", "put")


class TraceTree:
    """The spans of one trace."""

    def __init__(self, received: list[ReceivedSpan]) -> None:
        self.spans = received
        self._by_id = {span.span_id: span for span in received}

    @classmethod
    def of_request(cls, receiver: OtlpReceiver, request_id: str) -> TraceTree:
        """The trace of the request with this id; empty while its first span is not there."""
        for span in receiver.spans_named(spans.GENERATE.name):
            if span.attributes.get(spans.RESPONSE_ID) == request_id:
                return cls(receiver.trace(span.trace_id))
        return cls([])

    @property
    def root(self) -> ReceivedSpan:
        """The gateway's span of the call."""
        return next(span for span in self.spans if span.name == spans.GENERATE.name)

    def parent(self, span: ReceivedSpan) -> ReceivedSpan | None:
        """The span above, if it is there."""
        return self._by_id.get(span.parent_id)

    def depth(self, span: ReceivedSpan) -> int:
        """How many spans are above."""
        above = self.parent(span)
        return 0 if above is None else 1 + self.depth(above)

    def named(self, name: str, *, service: str = "") -> list[ReceivedSpan]:
        """The spans of a name, by their start."""
        return [s for s in self.spans if s.name == name and s.service.endswith(service)]

    def walk(self, top: ReceivedSpan | None = None) -> Iterator[ReceivedSpan]:
        """Every span, each before its children, by their start."""
        above = top.span_id if top else ""
        for span in self.spans:
            is_top = top is None and self.parent(span) is None
            if is_top or (top is not None and span.parent_id == above):
                yield span
                yield from self.walk(span)

    def first_token_parts_s(self) -> dict[str, float]:
        """Seconds of each phase up to the first token, with the messages between the processes."""
        call = self.named(spans.PREFILL_CALL.name, service="prefill")[-1]
        near = {self.root.span_id, call.span_id}
        near |= {s.span_id for s in self.named(spans.PULL.name) if s.parent_id == call.span_id}
        parts = dict.fromkeys(FIRST_TOKEN_PARTS, 0.0)
        for span in self.spans:
            if span.name in parts and span.parent_id in near:
                parts[span.name] += (span.end_ns - span.start_ns) / 1e9
        return {**parts, "wire": self.root.attributes[spans.WIRE_S]}
