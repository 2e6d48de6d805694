"""Every way out of a process: OTLP over HTTP, Prometheus, the console, and none at all."""

from __future__ import annotations

import http.server
import itertools
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from mesh import spans
from mesh.export_plan import ExportPlan
from mesh.instruments import RECORDED, declare
from mesh.metric import Kind
from mesh.process import StartupError
from mesh.service_settings import ServiceSettings
from mesh.settings import parse_settings
from mesh.telemetry import Telemetry

WAIT_S = 20.0


def start(**settings: object) -> Telemetry:
    return Telemetry.start(
        role="toy",
        incarnation="1",
        settings=ServiceSettings(**settings),  # pyright: ignore[reportArgumentType]
    )


def scrape(telemetry: Telemetry) -> str:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{telemetry.metrics_port}/metrics", timeout=WAIT_S
    ) as answer:
        return answer.read().decode()


class _Receiver(http.server.BaseHTTPRequestHandler):
    bodies: dict[str, list[bytes]]
    arrived: threading.Condition

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.arrived:
            self.bodies.setdefault(self.path, []).append(body)
            self.arrived.notify_all()
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


@contextmanager
def http_receiver() -> Iterator[tuple[str, type[_Receiver]]]:
    """An OTLP/HTTP receiver that keeps bodies by path."""
    kind = type("Kept", (_Receiver,), {"bodies": {}, "arrived": threading.Condition()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", kind
        finally:
            server.shutdown()
            thread.join()


def test_otlp_over_http_reaches_both_paths() -> None:
    with http_receiver() as (endpoint, received):
        telemetry = start(otlp_endpoint=endpoint, otlp_protocol="http/protobuf")
        with telemetry.tracing.span(spans.QUEUE):
            telemetry.instruments.requests.add(3, {"state": "completed"})
        telemetry.close()
        (body,) = received.bodies["/v1/traces"]
        request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
        assert request.resource_spans[0].scope_spans[0].spans[0].name == spans.QUEUE.name
        metrics = received.bodies["/v1/metrics"][-1]
        exported = metrics_service_pb2.ExportMetricsServiceRequest.FromString(metrics)
        names = {m.name for m in exported.resource_metrics[0].scope_metrics[0].metrics}
        assert "kvmesh.requests" in names


def test_a_signals_own_endpoint_beats_the_shared_one() -> None:
    plan = ExportPlan.of(
        ServiceSettings(
            otlp_endpoint="http://all:4318/",
            otlp_traces_endpoint="http://traces:4318/own",
            otlp_protocol="http/protobuf",
        )
    )
    assert plan.endpoint_of("traces") == "http://traces:4318/own"
    assert plan.endpoint_of("metrics") == "http://all:4318/v1/metrics"


def test_prometheus_can_scrape_what_is_recorded() -> None:
    telemetry = start(metrics_port=0)
    try:
        telemetry.folds.series("decode_step_tokens").record(5)
        telemetry.instruments.kv_prefix_tokens.add(5, {"result": "hit"})
        telemetry.observe("kv_blocks", lambda: [(7, {"state": "sealed", "tier": "memory"})])
        text = scrape(telemetry)
        assert 'kvmesh_decode_step_tokens_bucket{le="8.0"} 1.0' in text
        assert 'kvmesh_kv_prefix_tokens_total{result="hit"} 5.0' in text
        assert 'kvmesh_kv_blocks{state="sealed",tier="memory"} 7.0' in text
        assert 'service_name="kvmesh-toy"' in text
    finally:
        telemetry.close()


def test_a_closed_prometheus_port_is_free_again() -> None:
    telemetry = start(metrics_port=0)
    port = telemetry.metrics_port
    telemetry.close()
    again = start(metrics_port=port)
    assert again.metrics_port == port
    again.close()


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"metrics on 127.0.0.1:{port} .--metrics-port"):
            start(metrics_port=port)


def test_the_console_gets_both_signals_and_stdout_neither(
    capfd: pytest.CaptureFixture[str],
) -> None:
    telemetry = start(traces_exporter=("console",), metrics_exporter=("console",))
    with telemetry.tracing.span(spans.QUEUE):
        telemetry.instruments.requests.add(1, {"state": "completed"})
    telemetry.close()
    out, err = capfd.readouterr()
    assert f'"name": "{spans.QUEUE.name}"' in err and "kvmesh.requests" in err and out == ""


def test_what_a_dead_receiver_loses_is_counted() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        telemetry = start(
            otlp_endpoint=endpoint,
            otlp_interval_ms=50,
            otlp_protocol="http/protobuf",
            metrics_exporter=("otlp", "prometheus"),
            metrics_port=0,
        )
        with telemetry.tracing.span(spans.QUEUE):
            pass
        lost = 'kvmesh_telemetry_dropped_total{signal="spans"} 1.0'
        never = threading.Event()
        while lost not in scrape(telemetry):  # pytest's own timeout ends it
            never.wait(0.1)
        telemetry.close()


def test_spans_that_the_queue_has_no_room_for_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.export_watch._MAX_QUEUED_SPANS", 520)
    monkeypatch.setattr("mesh.exporters.SPAN_DELAY_MS", 60_000)
    with socket.socket() as black_hole:  # accepts, never answers: the first batch hangs
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen()
        endpoint = f"http://127.0.0.1:{black_hole.getsockname()[1]}"
        telemetry = start(otlp_traces_endpoint=endpoint)
        for _ in range(3000):
            telemetry.tracing.begin(spans.QUEUE).end()
        exporters = telemetry._exporters
        assert exporters is not None
        assert exporters.num_dropped()["spans"] >= 3000 - 2 * 520
        telemetry.close()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("endpoint", ["", "http://127.0.0.1:1", "127.0.0.1:1"])
def test_no_combination_of_flags_fails_to_start(
    protocol: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.telemetry.CLOSE_TIMEOUT_S", 0.02)
    traces = [(), ("otlp",), ("console",), ("none",), ("otlp", "console")]
    metrics = [(), ("otlp",), ("prometheus",), ("none",), ("otlp", "prometheus", "console")]
    for traces_exporter, metrics_exporter, off in itertools.product(traces, metrics, (False, True)):
        telemetry = start(
            otlp_endpoint=endpoint,
            otlp_protocol=protocol,
            traces_exporter=traces_exporter,
            metrics_exporter=metrics_exporter,
            metrics_port=0,
            otel_sdk_disabled=off,
        )
        assert telemetry.is_enabled <= (not off)
        telemetry.close()


def test_the_standard_variables_are_understood() -> None:
    environ = {
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "otlp, prometheus",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317",
        "OTEL_EXPORTER_PROMETHEUS_PORT": "9999",
        "OTEL_EXPORTER_PROMETHEUS_HOST": "::1",
    }
    plan = ExportPlan.of(parse_settings(ServiceSettings, "toy", [], environ))
    assert plan.traces == () and plan.metrics == ("otlp", "prometheus")
    assert (plan.metrics_host, plan.metrics_port) == ("::1", 9999)
    off = parse_settings(ServiceSettings, "toy", [], {**environ, "OTEL_SDK_DISABLED": "true"})
    assert ExportPlan.of(off).is_empty
    with pytest.raises(SystemExit):
        parse_settings(ServiceSettings, "toy", ["--metrics-exporter", "graphite"], {})


def test_every_recorded_metric_is_made_with_its_declaration() -> None:
    made: dict[str, tuple[Kind, str]] = {}

    class Meter:
        def create_counter(self, name: str, unit: str, _: str) -> object:
            made[name] = Kind.COUNTER, unit
            return object()

        def create_histogram(self, name: str, unit: str, _: str, **__: object) -> object:
            made[name] = Kind.HISTOGRAM, unit
            return object()

    declare(Meter())  # pyright: ignore[reportArgumentType]
    assert made == {metric.name: (metric.kind, metric.unit) for metric in RECORDED.values()}
