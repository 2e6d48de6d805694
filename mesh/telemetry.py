"""Traces and metrics: every instrument is declared here, once (OpenTelemetry GenAI names where they exist).

Owns the providers and exporters of a process. Without an endpoint everything is a no-op object and no
thread runs; a dead endpoint changes neither start-up nor latency. Request ids are never attributes of metrics.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_SECONDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]
_SECONDS += [1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
_COUNTS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0]


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """All instruments of kvmesh; names and units as in docs/architecture.md."""

    time_to_first_token: Histogram
    time_per_output_token: Histogram
    request_duration: Histogram
    decode_step_tokens: Histogram
    decode_step_duration: Histogram
    decode_step_sequences: Histogram
    decode_tokens: Counter
    kv_transfer_duration: Histogram
    kv_transfer_io: Counter
    kv_prefix_tokens: Counter
    kv_verify_failures: Counter
    requests: Counter
    requests_rejected: Counter
    retries: Counter


class Telemetry:
    """One process's tracer and instruments."""

    def __init__(
        self, tracer: trace.Tracer, meter: Meter, shutdown: Iterable[Callable[[], object]] = ()
    ) -> None:
        self.tracer = tracer
        self.instruments = _declare(meter)
        self._meter = meter
        self._shutdown = tuple(shutdown)

    @classmethod
    def start(
        cls, *, role: str, incarnation: str, endpoint: str | None, interval_ms: int = 5000
    ) -> Telemetry:
        """No-op without an endpoint; otherwise OTLP over gRPC in background threads."""
        if not endpoint:
            return cls(trace.NoOpTracer(), metrics.NoOpMeter("kvmesh"))
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        resource = Resource.create(
            {"service.name": f"kvmesh-{role}", "service.instance.id": incarnation}
        )
        insecure = not endpoint.startswith("https://")
        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        spans = OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=2)
        tracers.add_span_processor(BatchSpanProcessor(spans, schedule_delay_millis=500))
        exporter = OTLPMetricExporter(endpoint=endpoint, insecure=insecure, timeout=2)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=interval_ms)
        meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        return cls(
            tracers.get_tracer("kvmesh"),
            meters.get_meter("kvmesh"),
            (tracers.shutdown, meters.shutdown),
        )

    def observe_blocks(self, callback: Callable[[], Iterable[tuple[int, dict[str, str]]]]) -> None:
        """Registers the source of kvmesh.kv.blocks{state,tier}."""

        def observe(_: CallbackOptions) -> list[Observation]:
            return [Observation(value, attributes) for value, attributes in callback()]

        self._meter.create_observable_gauge("kvmesh.kv.blocks", callbacks=[observe], unit="{block}")

    def close(self) -> None:
        """Flushes and stops the exporters, at most 1.5 s; the threads are daemons."""
        threads = [threading.Thread(target=stop, daemon=True) for stop in self._shutdown]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(1.5 / max(1, len(threads)))

    def traceparent(self) -> str:
        """W3C trace context of the current span; empty when nothing is traced."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent", "")

    def context(self, traceparent: str) -> Context | None:
        """The context a traceparent stands for; None when it is empty."""
        return _PROPAGATOR.extract({"traceparent": traceparent}) if traceparent else None


def _declare(meter: Meter) -> Instruments:
    def seconds(name: str, description: str) -> Histogram:
        return meter.create_histogram(
            name, "s", description, explicit_bucket_boundaries_advisory=_SECONDS
        )

    def numbers(name: str, unit: str, description: str) -> Histogram:
        return meter.create_histogram(
            name, unit, description, explicit_bucket_boundaries_advisory=_COUNTS
        )

    def counter(name: str, unit: str, description: str) -> Counter:
        return meter.create_counter(name, unit, description)

    return Instruments(
        time_to_first_token=seconds("gen_ai.server.time_to_first_token", "arrival to first token"),
        time_per_output_token=seconds("gen_ai.server.time_per_output_token", "mean after first"),
        request_duration=seconds("gen_ai.server.request.duration", "arrival to last token"),
        decode_step_tokens=numbers("kvmesh.decode.step.tokens", "{token}", "tokens of a step"),
        decode_step_duration=seconds("kvmesh.decode.step.duration", "one decode step"),
        decode_step_sequences=numbers("kvmesh.decode.step.sequences", "{sequence}", "in a step"),
        decode_tokens=counter("kvmesh.decode.tokens", "{token}", "generated, by disposition"),
        kv_transfer_duration=seconds("kvmesh.kv.transfer.duration", "one transfer"),
        kv_transfer_io=counter("kvmesh.kv.transfer.io", "By", "bytes moved, by direction"),
        kv_prefix_tokens=counter("kvmesh.kv.prefix.tokens", "{token}", "prompt tokens, by result"),
        kv_verify_failures=counter("kvmesh.kv.verify.failures", "{block}", "by reason"),
        requests=counter("kvmesh.requests", "{request}", "ended, by state"),
        requests_rejected=counter("kvmesh.requests.rejected", "{request}", "by reason"),
        retries=counter("kvmesh.retries", "{retry}", "by phase and reason"),
    )
