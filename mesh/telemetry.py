"""A process's traces and metrics, and the trace context that travels between processes.

Owns the choice between OTLP and nothing at all. Without an endpoint everything is a no-op object
and no thread runs; a dead endpoint changes neither start-up nor latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mesh.instruments import Instruments, declare

if TYPE_CHECKING:
    from mesh.otlp import Otlp

CLOSE_TIMEOUT_S = 1.5
_PROPAGATOR = TraceContextTextMapPropagator()


class Telemetry:
    """One process's tracer and instruments. Build with `start`, end with `close`."""

    tracer: trace.Tracer
    instruments: Instruments

    def __init__(self, tracer: trace.Tracer, meter: Meter, otlp: Otlp | None = None) -> None:
        self.tracer = tracer
        self.instruments = declare(meter)
        self._meter = meter
        self._otlp = otlp

    @classmethod
    def start(
        cls, *, role: str, incarnation: str, endpoint: str | None, interval_ms: int = 5000
    ) -> Telemetry:
        """No-op without an endpoint; otherwise OTLP over gRPC, metrics every interval_ms."""
        if not endpoint:
            return cls(trace.NoOpTracer(), metrics.NoOpMeter("kvmesh"))
        from mesh.otlp import Otlp  # loads the SDK, which a process without telemetry never needs

        otlp = Otlp(role=role, incarnation=incarnation, endpoint=endpoint, interval_ms=interval_ms)
        return cls(otlp.tracer, otlp.meter, otlp)

    @property
    def is_enabled(self) -> bool:
        """Whether anything is exported."""
        return self._otlp is not None

    def observe_blocks(
        self, callback: Callable[[], Iterable[tuple[int, Mapping[str, str]]]]
    ) -> None:
        """Registers the source of kvmesh.kv.blocks{state,tier}: (number, attributes) pairs.

        Called once per export, on the exporter's thread: it may read counters, nothing more.
        """

        def observe(_: CallbackOptions) -> list[Observation]:
            return [Observation(count, attributes) for count, attributes in callback()]

        self._meter.create_observable_gauge(
            "kvmesh.kv.blocks", [observe], "{block}", "blocks by {state,tier}"
        )

    def close(self) -> None:
        """Flushes and stops the exporters within CLOSE_TIMEOUT_S; may be called twice."""
        otlp, self._otlp = self._otlp, None
        if otlp is not None:
            otlp.close(CLOSE_TIMEOUT_S)

    def traceparent(self) -> str:
        """W3C trace context of the current span; empty when nothing is traced."""
        here = trace.get_current_span().get_span_context()
        if not here.is_valid:
            return ""
        return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"

    def context(self, traceparent: str) -> Context | None:
        """The context a traceparent stands for, for `start_span(context=...)`; None if empty."""
        if not traceparent:
            return None
        return _PROPAGATOR.extract({"traceparent": traceparent}, Context())
