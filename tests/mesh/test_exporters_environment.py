"""No flag and no variable of telemetry keeps a process from starting, whatever it says."""

from __future__ import annotations

import logging
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh import spans
from mesh.service_settings import ServiceSettings
from mesh.settings import parse_settings
from mesh.telemetry import Telemetry

ENDPOINTS = st.sampled_from(["", "http://127.0.0.1:1", "https://127.0.0.1:1", "127.0.0.1:1", "h:x"])
JUNK = st.sampled_from(["", "0", "-1", "1", "100000", "nonsense", "a=b,c", "=", "%zz", "/none"])
OURS = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINTS,
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ENDPOINTS,
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": ENDPOINTS,
    "OTEL_EXPORTER_OTLP_PROTOCOL": st.sampled_from(["grpc", "http/protobuf"]),
    "OTEL_METRIC_EXPORT_INTERVAL": st.sampled_from(["50", "5000", "3600000"]),
    "OTEL_TRACES_EXPORTER": st.sampled_from(["", "otlp", "console", "none", "otlp,console"]),
    "OTEL_METRICS_EXPORTER": st.sampled_from(["", "otlp", "none", "otlp,prometheus,console"]),
    "OTEL_SDK_DISABLED": st.sampled_from(["true", "false"]),
}
SDKS = (
    "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG", "OTEL_METRICS_EXEMPLAR_FILTER", "OTEL_METRIC_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_COMPRESSION",
    "OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_INSECURE",
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
)  # fmt: skip
ENVIRONMENTS = st.builds(
    lambda ours, sdks: {**ours, **sdks},
    st.fixed_dictionaries({}, optional=OURS),
    st.dictionaries(st.sampled_from(SDKS), JUNK, max_size=4),
)
FLAGS = st.lists(
    st.sampled_from(
        [
            "--log-format=json", "--log-level=debug", "--metrics-host=127.0.0.1",
            "--metrics-exporter=prometheus", "--traces-exporter=otlp", "--otel-sdk-disabled",
            "--otlp-protocol=http/protobuf", "--otlp-endpoint=http://127.0.0.1:1",
        ]
    ),
    unique=True,
)  # fmt: skip


def start(environ: dict[str, str], flags: list[str]) -> Telemetry:
    argv = ["--metrics-port", "0", *flags]
    parsed = parse_settings(ServiceSettings, "toy", argv, environ)
    return Telemetry.start(role="decode", incarnation="1", settings=parsed)


def set_all(patch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    patch.setattr("mesh.telemetry.CLOSE_TIMEOUT_S", 0.02)
    for name, value in environ.items():
        patch.setenv(name, value)


@given(environ=ENVIRONMENTS, flags=FLAGS)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_no_combination_fails(environ: dict[str, str], flags: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_all(patch, environ)
        telemetry = start(environ, flags)
        telemetry.instruments.kv_prefix_tokens.add(1, {"result": "hit"})
        telemetry.folds.series("decode_step_gap").record(0.1)
        with telemetry.tracing.span(spans.QUEUE):
            pass
        telemetry.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_METRICS_EXEMPLAR_FILTER", "nonsense"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "nonsense"),
    ],
)
def test_what_the_sdk_refuses_is_a_warning_and_leaves_no_port(
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_all(monkeypatch, {name: value})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--metrics-exporter", "prometheus,otlp", "--metrics-port", str(port)]
    with caplog.at_level(logging.WARNING):
        telemetry = start({}, flags)
    assert not telemetry.is_enabled
    (record,) = caplog.records
    assert "nothing is exported" in record.getMessage() and value in record.getMessage()
    monkeypatch.delenv(name)
    again = start({}, flags)
    assert again.metrics_port == port
    again.close()
