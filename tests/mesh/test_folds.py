"""Folded histograms are exported like any other; counters are there before their first event."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh import buckets
from mesh.instruments import COUNTED, RECORDED
from mesh.metric import Kind
from mesh.service_settings import ServiceSettings
from mesh.telemetry import Telemetry
from tests.support.otlp_receiver import OtlpReceiver


def samples(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    """Values by name and labels, those of the process's own apart."""
    url = f"http://127.0.0.1:{telemetry.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_both_exporters_tell_the_same_buckets() -> None:
    receiver = OtlpReceiver()
    settings = ServiceSettings(otlp_endpoint=receiver.start(), metrics_port=0)
    telemetry = Telemetry.start(role="decode", incarnation="1", settings=settings)
    try:
        gap = telemetry.folds.series("decode_step_gap")
        forward = telemetry.folds.series("decode_step_part_duration", part="forward")
        for value in (0.00001, 0.0004, 0.0005, 7.0):  # on the first bound, inside, on one, above
            gap.record(value)
        forward.record(0.25)
        found = samples(telemetry)
        name = "kvmesh_decode_step_gap_seconds"
        assert found[f"{name}_count",] == 4 and found[f"{name}_sum",] == pytest.approx(7.00091)
        assert [found[f"{name}_bucket", le] for le in ("1e-05", "0.00025", "0.0005", "2.5")] == [
            1, 1, 3, 3,
        ]  # fmt: skip
        assert found["kvmesh_decode_step_part_duration_seconds_count", "forward"] == 1
    finally:
        telemetry.close()
        receiver.close()
    point = receiver.metric_points("kvmesh.decode.step.gap")[-1]
    assert point.bounds == buckets.PART_S and sum(point.buckets) == point.count == 4
    assert point.buckets[0] == 1 and point.buckets[-1] == 1
    (part,) = receiver.metric_points("kvmesh.decode.step.part.duration")
    assert part.attributes == {"part": "forward"}


@pytest.mark.parametrize("role", COUNTED)
def test_a_roles_counters_are_there_before_their_first_event(role: str) -> None:
    telemetry = Telemetry.start(
        role=role, incarnation="1", settings=ServiceSettings(metrics_port=0)
    )
    found = samples(telemetry)
    telemetry.close()
    for key in COUNTED[role]:
        metric = RECORDED[key]
        assert metric.kind is Kind.COUNTER
        for name, values in metric.attributes.items():
            of_metric = [
                labels for labels in found if labels[0].startswith(metric.name.replace(".", "_"))
            ]
            assert of_metric and all(found[labels] == 0 for labels in of_metric)
            assert set(values) == {v for labels in of_metric for v in labels if v in values}, name
