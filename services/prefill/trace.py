"""What a prompt's trace says of computing it: the whole, each chunk, the hand-off.

Owns the span of the computation. Never times anything itself: times are the prompt's own.
"""

from __future__ import annotations

from engine.sequence import StepItem, StepOutcome
from mesh import spans
from mesh.tracing import NO_SPAN, Tracing


class PromptTrace:
    """One prompt's, made within its call; `close` may come at any time."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._prefill = NO_SPAN

    def on_memory(self, arrived_at: float, at: float) -> None:
        """There is memory for the prompt."""
        self._tracing.record(spans.QUEUE, began_at=arrived_at, ended_at=at)

    def begin(self, at: float, num_tokens: int) -> None:
        """num_tokens are with the engine since `at`."""
        self._prefill = self._tracing.begin(
            spans.PREFILL, at=at, attributes={spans.TOKENS: num_tokens}
        )

    def on_step(self, item: StepItem, outcome: StepOutcome) -> None:
        """A chunk has been computed."""
        if not self._prefill.is_recording:
            return
        self._tracing.record(
            spans.CHUNK,
            began_at=outcome.done_at - outcome.duration_s,
            ended_at=outcome.done_at,
            parent=self._prefill.context,
            attributes={
                spans.STEP: outcome.step,
                spans.TOKENS: item.num_tokens,
                spans.POSITION: item.num_computed_before,
                spans.SEQUENCES: len(outcome.items),
            },
        )

    def on_computed(self, at: float) -> None:
        """The last chunk was computed then."""
        self._prefill.end(at)

    def on_handed_off(self, computed_at: float, at: float) -> None:
        """The hand-off is made."""
        self._tracing.record(spans.PUT, began_at=computed_at, ended_at=at)

    def fail(self, reason: str) -> None:
        """A step failed."""
        self._prefill.fail(reason)

    def close(self) -> None:
        """Ends what is open."""
        self._prefill.end()
