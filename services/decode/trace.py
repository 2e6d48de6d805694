"""What traces say of a rank: a request's stay, and now and then a step.

Owns which steps are told of. Never times anything itself.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.context import Context

from engine.sequence import Sequence, StepOutcome
from mesh import spans
from mesh.telemetry import Telemetry
from mesh.tracing import Span, Tracing, Value
from protos import decode_pb2


def begin_decode(telemetry: Telemetry, admit: decode_pb2.Admit) -> Span:
    """The span of an admitted request, in the trace that it came with."""
    attributes: dict[str, Value] = {
        spans.REQUEST_ID: admit.request_id,
        spans.SEQUENCES: len(admit.sequences),
    }
    if not admit.HasField("handoff"):
        attributes[spans.RESUMED_TOKENS] = sum(len(s.output_token_ids) for s in admit.sequences)
    parent = telemetry.context(admit.traceparent)
    return telemetry.tracing.begin(spans.DECODE, parent=parent, attributes=attributes)


class StepSpans:
    """One step of `interval` becomes a span; 0 is none. span_of: the request's of a sequence."""

    def __init__(
        self, tracing: Tracing, interval: int, span_of: Callable[[Sequence], Span]
    ) -> None:
        self._tracing = tracing
        self._interval = interval if tracing.is_on else 0
        self._span_of = span_of

    def record(self, outcome: StepOutcome) -> None:
        """Takes every step, before its items end any request."""
        if not self._interval or outcome.step % self._interval:
            return
        requests = {self._span_of(item.sequence) for item in outcome.items}
        parts_s = {
            "schedule": outcome.schedule_s,
            "forward": outcome.forward_s,
            "sample": outcome.sample_s,
            "emit": outcome.emit_s,
            "gap": outcome.gap_s,
        }
        self._tracing.record(
            spans.DECODE_STEP,
            began_at=outcome.done_at - outcome.duration_s,
            ended_at=outcome.done_at,
            parent=Context(),
            links=[span.link for span in requests],
            attributes={
                spans.STEP: outcome.step,
                spans.SEQUENCES: len(outcome.items),
                spans.TOKENS: sum(len(item.token_ids) for item in outcome.items),
                **{spans.STEP_PARTS[part]: duration_s for part, duration_s in parts_s.items()},
            },
        )
