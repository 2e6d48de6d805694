"""A process's traces and metrics, and the trace context that travels between processes.

Owns the choice between exporting and nothing at all. Without an exporter everything is a no-op
object and no thread runs; a dead endpoint changes neither start-up nor latency.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mesh.export_plan import ExportPlan
from mesh.folds import Folds
from mesh.instruments import OBSERVABLE, Instruments, Kind, declare, start_at_zero
from mesh.process import StartupError
from mesh.tracing import Tracing

if TYPE_CHECKING:
    from mesh.exporters import Exporters
    from mesh.service_settings import ServiceSettings

log = logging.getLogger("kvmesh.telemetry")
CLOSE_TIMEOUT_S = 1.5
Observed = Iterable[tuple[float, Mapping[str, str]]]
_PROPAGATOR = TraceContextTextMapPropagator()


class Telemetry:
    """One process's tracer and instruments. Build with `start` or `off`, end with `close`."""

    tracing: Tracing
    instruments: Instruments
    folds: Folds

    def __init__(
        self,
        tracer: trace.Tracer | None,
        meter: Meter,
        folds: Folds,
        exporters: Exporters | None = None,
    ) -> None:
        self.tracing = Tracing(tracer)
        self.instruments = declare(meter)
        self.folds = folds
        self._meter = meter
        self._exporters = exporters

    @classmethod
    def start(cls, *, role: str, incarnation: str, settings: ServiceSettings) -> Telemetry:
        """Exports what the settings say; StartupError when the Prometheus port cannot be had.

        Variables that only OpenTelemetry's SDK reads stop nothing: with one that it refuses nothing
        is exported, and a warning says why.
        """
        plan = ExportPlan.of(settings)
        if plan.is_empty:
            return cls.off()
        from mesh.exporters import Exporters  # loads the SDK, which nobody else needs

        folds = Folds()
        try:
            exporters = Exporters(role=role, incarnation=incarnation, plan=plan, folds=folds)
        except StartupError:
            raise
        except Exception as error:  # of the SDK and its plug-ins, which raise what they like
            log.warning("nothing is exported, OpenTelemetry does not start: %s", error)
            return cls.off()
        telemetry = cls(exporters.tracer, exporters.meter, folds, exporters)
        start_at_zero(telemetry.instruments, role)
        telemetry.observe(
            "telemetry_dropped",
            lambda: [(n, {"signal": s}) for s, n in exporters.num_dropped().items()],
        )
        if exporters.port is not None:
            log.info("metrics at http://%s:%d/metrics", plan.metrics_host, exporters.port.port)
        return telemetry

    @classmethod
    def off(cls) -> Telemetry:
        """No-op objects; trace context still passes through."""
        return cls(None, metrics.NoOpMeter("kvmesh"), Folds())

    @property
    def is_enabled(self) -> bool:
        """Whether anything is exported."""
        return self._exporters is not None

    @property
    def metrics_port(self) -> int | None:
        """Where Prometheus can scrape this process."""
        port = self._exporters.port if self._exporters else None
        return port.port if port else None

    def observe(self, name: str, callback: Callable[[], Observed]) -> None:
        """Registers the source of an observed instrument (a key of `mesh.instruments.OBSERVABLE`).

        The callback gives (value, attributes) pairs, once per export, on the exporter's thread: it
        may read counters, nothing more.
        """
        metric = OBSERVABLE[name]

        def observe(_: CallbackOptions) -> list[Observation]:
            return [Observation(value, attributes) for value, attributes in callback()]

        create = (
            self._meter.create_observable_counter
            if metric.kind is Kind.OBSERVED_COUNTER
            else self._meter.create_observable_gauge
        )
        create(metric.name, [observe], metric.unit, metric.description)

    def close(self) -> None:
        """Flushes and stops the exporters within CLOSE_TIMEOUT_S; may be called twice."""
        exporters, self._exporters = self._exporters, None
        if exporters is not None:
            exporters.close(CLOSE_TIMEOUT_S)

    def traceparent(self) -> str:
        """W3C trace context of the current span; empty when there is none."""
        here = trace.get_current_span().get_span_context()
        if not here.is_valid:
            return ""
        return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"

    def context(self, traceparent: str) -> Context | None:
        """The context a traceparent stands for, as the parent of spans; None if empty."""
        if not traceparent:
            return None
        return _PROPAGATOR.extract({"traceparent": traceparent}, Context())
