"""An OTLP gRPC receiver that keeps what it is sent, for tests of telemetry.

Runs on threads of its own, so it serves synchronous tests, asyncio tests and a loop that is blocked
by a flush alike. Never interprets: spans and points are kept in the order of arrival.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSpan:
    """One finished span; ids are hex, parent_id is empty for a root.

    kind is INTERNAL, SERVER or CLIENT; links are trace and span ids.
    """

    name: str
    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    is_error: bool
    attributes: dict[str, Any]
    start_ns: int
    end_ns: int
    kind: str
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPoint:
    """One exported point, cumulative since the process started.

    A counter or gauge has `value`; a histogram has `count`, `sum`, `bounds` and `buckets`.
    """

    name: str
    service: str
    instance: str
    attributes: dict[str, Any]
    value: float = 0.0
    count: int = 0
    sum: float = 0.0
    bounds: tuple[float, ...] = ()
    buckets: tuple[int, ...] = ()


@dataclass
class OtlpReceiver:
    """Collects spans and metric points; `start` gives the endpoint, `close` ends it."""

    spans: list[ReceivedSpan] = field(default_factory=list)
    points: list[MetricPoint] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)  # all of each export, as text
    endpoint: str = ""

    def __post_init__(self) -> None:
        self._arrived = threading.Condition()
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)

    def start(self) -> str:
        """Listens on a free local port; returns http://host:port."""
        add_traces = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_metrics = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
        add_traces(_TraceServicer(self), self._server)
        add_metrics(_MetricsServicer(self), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.endpoint = f"http://127.0.0.1:{port}"
        return self.endpoint

    def close(self) -> None:
        """Stops listening; what was received stays."""
        self._server.stop(None).wait()
        self._pool.shutdown()

    def spans_named(self, name: str) -> list[ReceivedSpan]:
        """The spans of that name."""
        return [span for span in list(self.spans) if span.name == name]

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """The spans of one trace, by their start."""
        found = [span for span in list(self.spans) if span.trace_id == trace_id]
        return sorted(found, key=lambda span: (span.start_ns, -span.end_ns))

    def metric_points(self, name: str) -> list[MetricPoint]:
        """Every exported point of a metric, oldest first; counters are cumulative."""
        return [point for point in list(self.points) if point.name == name]

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        """Blocks until the predicate holds, looking after each export; AssertionError if never."""
        with self._arrived:
            if not self._arrived.wait_for(predicate, timeout_s):
                raise AssertionError(
                    f"not within {timeout_s} s; spans {sorted({s.name for s in self.spans})}, "
                    f"metrics {sorted({p.name for p in self.points})}"
                )

    async def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        """`wait_until` for a coroutine; the predicate runs on another thread."""
        await asyncio.to_thread(self.wait_until, predicate, timeout_s)

    def keep(self, export: str, spans: list[ReceivedSpan], points: list[MetricPoint]) -> None:
        """Adds what one export brought."""
        with self._arrived:
            self.exports.append(export)
            self.spans.extend(spans)
            self.points.extend(points)
            self._arrived.notify_all()


class _TraceServicer(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(  # noqa: N802 - gRPC method name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        spans = [
            ReceivedSpan(
                name=span.name,
                service=resource.get("service.name", ""),
                instance=resource.get("service.instance.id", ""),
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                is_error=span.status.code == span.status.STATUS_CODE_ERROR,
                attributes=_attributes(span.attributes),
                start_ns=span.start_time_unix_nano,
                end_ns=span.end_time_unix_nano,
                kind=span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            )
            for group in request.resource_spans
            for resource in [_attributes(group.resource.attributes)]
            for scope in group.scope_spans
            for span in scope.spans
        ]
        self._receiver.keep(str(request), spans, [])
        return trace_service_pb2.ExportTraceServiceResponse()


class _MetricsServicer(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(  # noqa: N802 - gRPC method name
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: object
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        points = [
            point
            for group in request.resource_metrics
            for resource in [_attributes(group.resource.attributes)]
            for scope in group.scope_metrics
            for metric in scope.metrics
            for point in _points(metric, resource)
        ]
        self._receiver.keep(str(request), [], points)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _points(metric: metrics_pb2.Metric, resource: dict[str, Any]) -> Iterator[MetricPoint]:
    origin = {
        "name": metric.name,
        "service": resource.get("service.name", ""),
        "instance": resource.get("service.instance.id", ""),
    }
    for point in (*metric.sum.data_points, *metric.gauge.data_points):
        value = point.as_double if point.HasField("as_double") else float(point.as_int)
        yield MetricPoint(**origin, attributes=_attributes(point.attributes), value=value)
    for histogram in metric.histogram.data_points:
        yield MetricPoint(
            **origin,
            attributes=_attributes(histogram.attributes),
            count=histogram.count,
            sum=histogram.sum,
            bounds=tuple(histogram.explicit_bounds),
            buckets=tuple(histogram.bucket_counts),
        )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
