"""Where a process's traces and metrics go: OTLP, a Prometheus port, the console; in background
threads.

Owns the SDK's providers, exporting and its bounded end; never blocks a caller. Imported only when
something is exported.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    ConsoleMetricExporter,
    MetricReader,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Tracer

from mesh.export_plan import ExportPlan
from mesh.export_watch import CountedSpans, Link, watched
from mesh.folded_readers import folded
from mesh.folds import Folds
from mesh.prometheus_port import PrometheusPort

log = logging.getLogger("kvmesh.telemetry")
EXPORT_TIMEOUT_S = 2.0
SPAN_DELAY_MS = 500
_MODULES = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
}


class Exporters:
    """Tracer and meter of one process. StartupError: the Prometheus port cannot be had."""

    def __init__(self, *, role: str, incarnation: str, plan: ExportPlan, folds: Folds) -> None:
        # The SDK reports every failed export and every dropped span; `Link` reports once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        ours = {
            "service.name": f"kvmesh-{role}",
            "service.namespace": "kvmesh",
            "service.instance.id": incarnation,
        }
        # What the user says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) wins.
        resource = Resource.create(ours).merge(OTELResourceDetector().detect())
        self._link = Link(plan.endpoint or "of the default address")
        self._closers: list[Callable[[], None]] = []
        self.port: PrometheusPort | None = None
        self._folds = folds
        self._tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        try:
            for name in plan.traces:
                self._tracers.add_span_processor(
                    CountedSpans(self._span_exporter(name, plan), SPAN_DELAY_MS, self._link)
                )
            readers = [self._reader(name, plan) for name in plan.metrics]
            self._meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
        except BaseException:
            self._tracers.shutdown()
            if self.port is not None:
                self.port.close()
            raise
        # Without an exporter no span is made at all.
        self.tracer: Tracer | None = self._tracers.get_tracer("kvmesh") if plan.traces else None
        self.meter: Meter = self._meters.get_meter("kvmesh")

    def num_dropped(self) -> dict[str, int]:
        """Spans and metric exports that were lost so far, by signal."""
        return dict(self._link.num_dropped)

    def close(self, timeout_s: float) -> None:
        """Flushes what is left, for at most timeout_s seconds; a dead endpoint loses it."""
        deadline = time.monotonic() + timeout_s
        ends: list[Callable[[], None]] = [self._tracers.shutdown, self._meters.shutdown]
        threads = [threading.Thread(target=end, daemon=True, name="kvmesh-flush") for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._link.hush()
        if any(thread.is_alive() for thread in threads):
            for end in self._closers:  # interrupts the exporters' own waits, so their threads end
                end()
        if self.port is not None:
            self.port.close()

    def _span_exporter(self, name: str, plan: ExportPlan) -> SpanExporter:
        if name == "console":
            return ConsoleSpanExporter(out=sys.stderr)
        kind = _otlp_class(plan, "trace_exporter", "OTLPSpanExporter")
        return self._opened(kind(**_otlp_options(plan, "traces")))

    def _reader(self, name: str, plan: ExportPlan) -> MetricReader:
        if name == "prometheus":
            self.port = PrometheusPort(plan.metrics_host, plan.metrics_port, self._folds)
            return self.port.reader
        if name == "console":
            exporter: Any = ConsoleMetricExporter(out=sys.stderr)
        else:
            kind = watched(_otlp_class(plan, "metric_exporter", "OTLPMetricExporter"), self._link)
            exporter = self._opened(kind(**_otlp_options(plan, "metrics")))
        return folded(PeriodicExportingMetricReader, self._folds)(
            exporter, plan.interval_ms, export_timeout_millis=EXPORT_TIMEOUT_S * 1000
        )

    def _opened(self, exporter: Any) -> Any:
        """Its waits can be interrupted at the end."""
        self._closers.append(exporter.shutdown)
        return exporter


def _otlp_class(plan: ExportPlan, module: str, name: str) -> type[Any]:
    return getattr(importlib.import_module(f"{_MODULES[plan.protocol]}.{module}"), name)


def _otlp_options(plan: ExportPlan, signal: str) -> dict[str, Any]:
    """Headers and certificates the SDK reads itself."""
    endpoint = plan.endpoint_of(signal)
    options: dict[str, Any] = {"endpoint": endpoint or None, "timeout": EXPORT_TIMEOUT_S}
    if plan.protocol == "grpc":
        options["insecure"] = not endpoint.startswith("https://")
    return options
