"""The flags that every service has: where it listens, how it ends, what it logs and exports.

Owns names, defaults and limits; never reads anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.settings import parse_names, setting


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Flags every service has. A subclass adds fields; its __post_init__ may raise ValueError."""

    host: str = setting("127.0.0.1", group="network", help="address to listen on")
    port: int = setting(
        0, group="network", help="port to listen on; 0 picks one", minimum=0, maximum=65535
    )
    die_with_parent: bool = setting(
        False, group="process", help="drain and end when the process that started this one ends"
    )
    drain_s: float = setting(
        10.0, group="process", help="seconds to finish live requests on SIGTERM", minimum=0
    )
    num_threads: int = setting(
        1, group="process", help="CPU threads for tensor work", minimum=1, maximum=1024
    )
    log_format: str = setting(
        "text", group="telemetry", help="form of log lines", choices=("text", "json")
    )
    log_level: str = setting(
        "info",
        group="telemetry",
        help="least severe log line",
        choices=("debug", "info", "warning", "error"),
    )
    otlp_endpoint: str = setting(
        "",
        group="telemetry",
        help="OTLP endpoint such as http://host:4317",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    otlp_traces_endpoint: str = setting(
        "",
        group="telemetry",
        help="OTLP endpoint of traces where it is another; over HTTP with its path",
        env="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    )
    otlp_metrics_endpoint: str = setting(
        "",
        group="telemetry",
        help="the same for metrics",
        env="OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    )
    otlp_protocol: str = setting(
        "grpc",
        group="telemetry",
        help="how OTLP travels",
        choices=("grpc", "http/protobuf"),
        env="OTEL_EXPORTER_OTLP_PROTOCOL",
    )
    otlp_interval_ms: int = setting(
        5000,
        group="telemetry",
        help="milliseconds between two metric exports",
        minimum=50,
        maximum=3_600_000,
        env="OTEL_METRIC_EXPORT_INTERVAL",
    )
    traces_exporter: tuple[str, ...] = setting(
        (),
        group="telemetry",
        help="of otlp, console, none; default: otlp where an endpoint is set",
        env="OTEL_TRACES_EXPORTER",
        parse=parse_names("otlp", "console", "none"),
    )
    metrics_exporter: tuple[str, ...] = setting(
        (),
        group="telemetry",
        help="of otlp, prometheus, console, none; default: otlp where an endpoint and prometheus "
        "where a port is set",
        env="OTEL_METRICS_EXPORTER",
        parse=parse_names("otlp", "prometheus", "console", "none"),
    )
    metrics_port: int | None = setting(
        None,
        group="telemetry",
        help="port of Prometheus' /metrics; 0 picks one; with --metrics-exporter prometheus 9464",
        minimum=0,
        maximum=65535,
        env="OTEL_EXPORTER_PROMETHEUS_PORT",
    )
    metrics_host: str = setting(
        "",
        group="telemetry",
        help="address of /metrics; default: --host",
        env="OTEL_EXPORTER_PROMETHEUS_HOST",
    )
    otel_sdk_disabled: bool = setting(
        False, group="telemetry", help="export nothing", env="OTEL_SDK_DISABLED"
    )
