"""Watches exporting: says once that an endpoint does not answer, and counts what is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

log = logging.getLogger("kvmesh.telemetry")
_MAX_QUEUED_SPANS = 4096


class Link:
    """Whether the endpoint answers; says once in a process's life that it does not.

    num_dropped: by signal ("spans", "metrics"); written by the exporters' own threads.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._is_hushed = False
        self.num_dropped = {"spans": 0, "metrics": 0}

    def report(self, is_ok: bool, signal: str, num_items: int) -> None:
        """Takes the outcome of one export."""
        if is_ok:
            return
        self.drop(signal, num_items)
        if not self.hush():
            log.warning("telemetry endpoint %s does not answer; serving goes on", self._endpoint)

    def drop(self, signal: str, num_items: int) -> None:
        """Counts what is lost."""
        with self._lock:
            self.num_dropped[signal] += num_items

    def hush(self) -> bool:
        """Says nothing more; returns whether that was so already."""
        with self._lock:
            before, self._is_hushed = self._is_hushed, True
        return before


def watched(kind: type[Any], link: Link) -> type[Any]:
    """A class of metric exporters like `kind` that reports each export to the link."""

    class Watched(kind):
        def export(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().export(batch, *args, **kwargs)
            link.report(result.name == "SUCCESS", "metrics", 1)
            return result

    return Watched


class CountedSpans(BatchSpanProcessor):
    """The SDK's batch processor; spans that its queue has no room for are counted."""

    def __init__(self, exporter: SpanExporter, delay_ms: int, link: Link) -> None:
        self._num_waiting = 0
        self._link = link
        self._count_lock = threading.Lock()
        super().__init__(
            _Watched(exporter, link, self._take),
            schedule_delay_millis=delay_ms,
            max_queue_size=_MAX_QUEUED_SPANS,
        )

    def on_end(self, span: ReadableSpan) -> None:
        """Queues a span; when the queue is full the SDK drops the oldest."""
        if span.context is not None and span.context.trace_flags.sampled:
            with self._count_lock:
                is_full = self._num_waiting >= _MAX_QUEUED_SPANS
                self._num_waiting += not is_full
            if is_full:
                self._link.drop("spans", 1)
        super().on_end(span)

    def _take(self, num_spans: int) -> None:
        with self._count_lock:
            self._num_waiting = max(0, self._num_waiting - num_spans)


class _Watched(SpanExporter):
    """An exporter that says how many spans it was given and reports what came of them."""

    def __init__(self, exporter: SpanExporter, link: Link, on_batch: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._link = link
        self._on_batch = on_batch

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._on_batch(len(spans))
        result = self._exporter.export(spans)
        self._link.report(result is SpanExportResult.SUCCESS, "spans", len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)
