"""What a process exports, decided from its settings alone.

Follows OpenTelemetry's variables (specification, "Environment Variable Specification" and
"OpenTelemetry Protocol Exporter"): OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER are lists; when
they are not set, OTLP is on where an endpoint is, and Prometheus where a port is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.service_settings import ServiceSettings

PROMETHEUS_PORT = 9464
_PATHS = {"traces": "v1/traces", "metrics": "v1/metrics"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Exporters by signal, and where they export to."""

    traces: tuple[str, ...]
    metrics: tuple[str, ...]
    endpoint: str
    signal_endpoints: tuple[tuple[str, str], ...]
    protocol: str
    interval_ms: int
    metrics_host: str
    metrics_port: int

    @classmethod
    def of(cls, settings: ServiceSettings) -> ExportPlan:
        """The plan of a process with these settings."""
        own = {"traces": settings.otlp_traces_endpoint, "metrics": settings.otlp_metrics_endpoint}
        has_port = settings.metrics_port is not None
        chosen = {
            "traces": settings.traces_exporter
            or (("otlp",) if settings.otlp_endpoint or own["traces"] else ()),
            "metrics": settings.metrics_exporter
            or (
                *(("otlp",) if settings.otlp_endpoint or own["metrics"] else ()),
                *(("prometheus",) if has_port else ()),
            ),
        }
        none = settings.otel_sdk_disabled
        return cls(
            traces=() if none else _named(chosen["traces"]),
            metrics=() if none else _named(chosen["metrics"]),
            endpoint=settings.otlp_endpoint,
            signal_endpoints=tuple(own.items()),
            protocol=settings.otlp_protocol,
            interval_ms=settings.otlp_interval_ms,
            metrics_host=settings.metrics_host or settings.host,
            metrics_port=PROMETHEUS_PORT
            if settings.metrics_port is None
            else settings.metrics_port,
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is exported."""
        return not self.traces and not self.metrics

    def endpoint_of(self, signal: str) -> str:
        """The endpoint of a signal, "traces" or "metrics"; empty is the SDK's default.

        A signal's own endpoint is used as it is; over HTTP the shared one gets the signal's path.
        """
        own = dict(self.signal_endpoints)[signal]
        if own or not self.endpoint or self.protocol == "grpc":
            return own or self.endpoint
        return f"{self.endpoint.rstrip('/')}/{_PATHS[signal]}"


def _named(exporters: tuple[str, ...]) -> tuple[str, ...]:
    """Each once, without "none"."""
    return tuple(dict.fromkeys(name for name in exporters if name != "none"))
