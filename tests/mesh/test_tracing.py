"""Spans cost nothing without an exporter and never end a request."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mesh import spans
from mesh.service_settings import ServiceSettings
from mesh.telemetry import Telemetry
from mesh.tracing import NO_SPAN, SpanClock, Tracing


class Broken(SpanProcessor):
    """Raises wherever it is asked."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.num_raised = 0

    def on_start(self, span: object, parent_context: object = None) -> None:
        self._raise("start")

    def on_end(self, span: ReadableSpan) -> None:
        self._raise("end")

    def _raise(self, where: str) -> None:
        if where == self._where:
            self.num_raised += 1
            raise RuntimeError("told to fail")


def tracing_of(*processors: SpanProcessor) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return Tracing(provider.get_tracer("test"))


@pytest.mark.parametrize("where", ["start", "end"])
def test_trouble_of_the_sdk_stays_in_telemetry(where: str) -> None:
    broken = Broken(where)
    tracing, did = tracing_of(broken), []
    with tracing.span(spans.PULL) as span:
        span.set({spans.KEYS: 3})
        did.append("served")
    tracing.record(spans.PUT, began_at=1.0, ended_at=2.0)
    assert did == ["served"] and broken.num_raised == 2


def test_without_an_exporter_of_traces_there_are_no_spans() -> None:
    metrics_only = Telemetry.start(
        role="toy", incarnation="toy-1", settings=ServiceSettings(metrics_port=0)
    )
    for telemetry in (metrics_only, Telemetry.off()):
        assert telemetry.tracing.begin(spans.PULL) is NO_SPAN
        with telemetry.tracing.span(spans.PULL) as span:
            assert span is NO_SPAN and not trace.get_current_span().get_span_context().is_valid
        telemetry.close()


def test_spans_that_share_a_moment_share_it_exactly() -> None:
    kept = InMemorySpanExporter()
    tracing = tracing_of(SimpleSpanProcessor(kept))
    times = [1000.1, 1000.100001, 1003.7]
    tracing.record(spans.LOOKUP, began_at=times[0], ended_at=times[1])
    tracing.record(spans.GET, began_at=times[1], ended_at=times[2])
    first, second = kept.get_finished_spans()
    assert first.end_time == second.start_time
    assert first.start_time is not None and second.end_time is not None
    assert second.end_time - first.start_time == pytest.approx(3.6e9, abs=2)


def test_a_step_of_the_wall_clock_moves_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SpanClock()
    before = clock.at(5.0)
    real = clock._offset_ns
    monkeypatch.setattr("mesh.tracing._offset_ns", lambda: real + 3_600_000_000_000)
    assert clock.at(5.0) - before == 3_600_000_000_000


def test_an_error_is_named_and_not_quoted() -> None:
    kept = InMemorySpanExporter()
    tracing = tracing_of(SimpleSpanProcessor(kept))
    with (
        pytest.raises(ValueError, match="the client's own words"),
        tracing.span(spans.PULL) as span,
    ):
        span.fail("DIGEST")
        raise ValueError("the client's own words")
    (failed,) = kept.get_finished_spans()
    assert failed.status.status_code is trace.StatusCode.ERROR and not failed.events
    assert dict(failed.attributes or {}) == {spans.ERROR_TYPE: "DIGEST"}
    assert failed.status.description is None
