"""OTLP over gRPC: the providers and exporters of a process, in background threads.

Owns exporting and its bounded end; never blocks a caller. Imported only when an endpoint is set.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Tracer

log = logging.getLogger("kvmesh.telemetry")
EXPORT_TIMEOUT_S = 2.0
SPAN_DELAY_MS = 500


class Otlp:
    """Tracer and meter of one process, exporting to one endpoint."""

    def __init__(self, *, role: str, incarnation: str, endpoint: str, interval_ms: int) -> None:
        # The SDK reports every failed export and every dropped span; `_Link` reports once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        resource = Resource.create(
            {
                "service.name": f"kvmesh-{role}",
                "service.namespace": "kvmesh",
                "service.instance.id": incarnation,
            }
        )
        self._link = link = _Link(endpoint)
        options: dict[str, Any] = {
            "endpoint": endpoint,
            "insecure": not endpoint.startswith("https://"),
            "timeout": EXPORT_TIMEOUT_S,
        }
        self._spans = _SpanExporter(link, options)
        self._metrics = _MetricExporter(link, options)
        self._tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._tracers.add_span_processor(
            BatchSpanProcessor(self._spans, schedule_delay_millis=SPAN_DELAY_MS)
        )
        reader = PeriodicExportingMetricReader(
            self._metrics, interval_ms, export_timeout_millis=EXPORT_TIMEOUT_S * 1000
        )
        self._meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self.tracer: Tracer = self._tracers.get_tracer("kvmesh")
        self.meter: Meter = self._meters.get_meter("kvmesh")

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
            self._spans.shutdown()  # interrupts the exporters' own waits, so their threads end
            self._metrics.shutdown()


class _Link:
    """Whether the endpoint answers; says once in a process's life that it does not."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()  # span and metric exporters report from their own threads
        self._is_hushed = False

    def report(self, is_ok: bool) -> None:
        """Takes the outcome of one export."""
        if is_ok or self.hush():
            return
        log.warning("telemetry endpoint %s does not answer; serving goes on", self._endpoint)

    def hush(self) -> bool:
        """Says nothing more; returns whether that was so already."""
        with self._lock:
            before, self._is_hushed = self._is_hushed, True
        return before


class _SpanExporter(OTLPSpanExporter):
    def __init__(self, link: _Link, options: dict[str, Any]) -> None:
        super().__init__(**options)
        self._link = link

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._link.report(result is SpanExportResult.SUCCESS)
        return result


class _MetricExporter(OTLPMetricExporter):
    def __init__(self, link: _Link, options: dict[str, Any]) -> None:
        super().__init__(**options)
        self._link = link

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **kwargs)
        self._link.report(result is MetricExportResult.SUCCESS)
        return result
