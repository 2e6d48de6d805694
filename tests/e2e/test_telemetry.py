"""One trace per request over four processes, and decode-step metrics, at an OTLP receiver."""

from __future__ import annotations

import socket
from pathlib import Path

from mesh import spans
from tests.support.generate import generate, greedy_request
from tests.support.mesh import running_mesh
from tests.support.otlp_receiver import OtlpReceiver

PROCESSES = {"kvmesh-gateway", "kvmesh-prefill", "kvmesh-decode", "kvmesh-kvstore"}


def test_a_request_is_one_trace_over_four_processes(tiny_model: Path) -> None:
    receiver = OtlpReceiver()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.start(),
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
    }

    def is_whole() -> bool:
        traces = {span.trace_id for span in receiver.spans_named(spans.GENERATE.name)}
        return any({s.service for s in receiver.trace(t)} >= PROCESSES for t in traces)

    try:
        with running_mesh(tiny_model, env=env) as mesh:
            generate(mesh, greedy_request(list(range(100)), 8))
            receiver.wait_until(is_whole, 20)

            def sums() -> list[float]:
                return [p.sum for p in receiver.metric_points("kvmesh.decode.step.tokens")]

            receiver.wait_until(lambda: 7 in sums(), 20)
            assert max(sums()) == 7
            point = receiver.metric_points("kvmesh.decode.step.tokens")[-1]
            assert point.service == "kvmesh-decode"
            parts = receiver.metric_points("kvmesh.decode.step.part.duration")
            names = {point.attributes["part"] for point in parts}
            assert names == {"schedule", "forward", "sample", "emit"}
            assert receiver.metric_points("kvmesh.decode.step.gap")[-1].count == 7
    finally:
        receiver.close()


def test_a_dead_collector_changes_nothing(tiny_model: Path) -> None:
    request = greedy_request(list(range(100)), 12)
    with running_mesh(tiny_model) as mesh:
        expected = generate(mesh, request).tokens
    with socket.socket() as black_hole:  # accepts connections, never answers
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen()
        endpoint = f"http://127.0.0.1:{black_hole.getsockname()[1]}"
        with running_mesh(tiny_model, env={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as mesh:
            assert generate(mesh, request).tokens == expected
