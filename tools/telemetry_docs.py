"""docs/telemetry.md, made from the tables of metrics and spans: `python -m tools.telemetry_docs`."""

from __future__ import annotations

from pathlib import Path

from mesh.instruments import ALL, GATEWAY, OBSERVED, STEP_COUNTS, STEPS, STORE, WORKERS
from mesh.metric import Metric
from mesh.spans import ALL as SPANS
from mesh.spans import ATTRIBUTES, SpanType

PATH = Path(__file__).resolve().parents[1] / "docs" / "telemetry.md"
_HEAD = """# Telemetry

Made from [mesh/instruments.py](../mesh/instruments.py) and [mesh/spans.py](../mesh/spans.py) by `make docs`;
do not edit.

Every process exports traces and metrics where its settings say. OpenTelemetry's variables and the
flags of the same meaning are both understood; nothing is exported unless one of them asks for it.

| variable | flag | meaning |
|---|---|---|
| `OTEL_EXPORTER_OTLP_ENDPOINT` | `--otlp-endpoint` | OTLP receiver of traces and metrics |
| `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, `..._METRICS_ENDPOINT` | `--otlp-traces-endpoint`, `--otlp-metrics-endpoint` | one signal elsewhere |
| `OTEL_EXPORTER_OTLP_PROTOCOL` | `--otlp-protocol` | `grpc` or `http/protobuf` |
| `OTEL_TRACES_EXPORTER` | `--traces-exporter` | `otlp`, `console`, `none`; a list |
| `OTEL_METRICS_EXPORTER` | `--metrics-exporter` | `otlp`, `prometheus`, `console`, `none`; a list |
| `OTEL_EXPORTER_PROMETHEUS_PORT`, `..._HOST` | `--metrics-port`, `--metrics-host` | Prometheus' `/metrics`; 0 picks a port |
| `OTEL_METRIC_EXPORT_INTERVAL` | `--otlp-interval-ms` | milliseconds between two exports |
| `OTEL_SDK_DISABLED` | `--otel-sdk-disabled` | nothing is exported |
| `KVMESH_TRACE_STEP_INTERVAL` | `--trace-step-interval` | of a worker: one decode step of so many is a span; 0 is none |
| `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_EXPORTER_OTLP_CERTIFICATE`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` | | read by OpenTelemetry's SDK |

`kvmesh up --metrics-port 9464` gives the gateway that port, and kvstores, prefills and decodes the ones behind it.
A receiver that is absent, slow or refusing changes neither start-up nor latency; what it costs is
counted in `kvmesh.telemetry.dropped`. A value that OpenTelemetry's SDK refuses stops no process: it
exports nothing and warns. No prompt, token or secret is in any signal.

Counters with closed attributes are there at 0 from the start. Histograms of decode steps are always
cumulative, whatever `OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE` says.

Prometheus writes the names with underscores and the unit behind: `kvmesh.decode.step.duration` is
`kvmesh_decode_step_duration_seconds`.
"""
_SPANS_HEAD = """
## Spans

One trace a request, over all processes: the trace context travels in gRPC metadata and, to decode ranks, in the
messages of their session. A client's own `traceparent` is honoured, its sampling flag too. JSON log lines of a request
carry `trace_id` and `span_id`.

A span of a phase has the very times that `kvmesh.phase.duration` is made of. Durations of queue (the gateway's and
prefill's), lookup, get and verify (of prefill's pull), prefill and put, and `kvmesh.wire_s` of the first span, add up to
`gen_ai.response.time_to_first_chunk` within a millisecond
([figures](../benchmarks/results/trace_request.json)).

| span | kind | made by | what | attributes |
|---|---|---|---|---|
"""


def render() -> str:
    """The page."""
    parts = [_HEAD]
    titles = (
        ("Requests, at the gateway", GATEWAY),
        ("Decode steps, at the ranks", {**STEPS, **STEP_COUNTS}),
        ("Transfers, at the workers", WORKERS),
        ("Blocks, at kvstores and their clients", STORE),
        ("Observed when they are exported", OBSERVED),
    )
    for title, metrics in titles:
        parts.append(
            f"\n## {title}\n\n| name | kind | unit | attributes | what |\n|---|---|---|---|---|"
        )
        parts += [_row(metric) for metric in metrics.values()]
    parts.append("\n## Buckets\n\n| metric | upper bounds |\n|---|---|")
    parts += [
        f"| `{metric.name}` | {', '.join(f'{bound:g}' for bound in metric.buckets)} |"
        for metric in ALL.values()
        if metric.buckets
    ]
    return "\n".join(parts) + "\n" + _spans()


def _spans() -> str:
    rows = [_span_row(span_type) for span_type in SPANS]
    rows.append("\n| attribute | what |\n|---|---|")
    rows += [f"| `{name}` | {description} |" for name, description in ATTRIBUTES.items()]
    return _SPANS_HEAD + "\n".join(rows) + "\n"


def _span_row(span_type: SpanType) -> str:
    attributes = ", ".join(f"`{name}`" for name in span_type.attributes)
    return (
        f"| `{span_type.name}` | {span_type.kind.name.lower()} | {', '.join(span_type.made_by)} | "
        f"{span_type.description} | {attributes} |"
    )


def _row(metric: Metric) -> str:
    attributes = (
        "; ".join(f"`{name}`: {', '.join(values)}" for name, values in metric.attributes.items())
        .replace("<", "")
        .replace(">", "")
    )
    return (
        f"| `{metric.name}` | {metric.kind.value} | `{metric.unit}` | {attributes} | "
        f"{metric.description} |"
    )


if __name__ == "__main__":
    PATH.write_text(render())
