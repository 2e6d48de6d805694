"""Spans of one process: begun and ended at times of the monotonic clock.

Owns the translation from that clock to the exporters'. Without an exporter of traces nothing is
made; trouble of the SDK is logged once and never reaches a caller.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ParamSpec, TypeAlias, TypeVar

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.context import Context

from mesh.spans import ERROR_TYPE, SpanType

log = logging.getLogger("kvmesh.telemetry")
Value: TypeAlias = str | bool | int | float | Sequence[str]
P = ParamSpec("P")
T = TypeVar("T")
_MAX_SKEW_NS = 1_000_000  # of the two clocks, before a step of the wall clock is followed


def _harmless(call: Callable[P, None]) -> Callable[P, None]:
    """Telemetry's own trouble must not end a request."""

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception:
            log.debug("a span is lost", exc_info=True)

    return guarded


class SpanClock:
    """Seconds of time.monotonic in nanoseconds since 1970, with one offset for all of a process.

    Spans that share a moment so share it exactly; a step of the wall clock moves later ones.
    """

    def __init__(self) -> None:
        self._offset_ns = _offset_ns()

    def at(self, monotonic_s: float | None) -> int:
        """That moment; None is now."""
        offset_ns = _offset_ns()
        if abs(offset_ns - self._offset_ns) > _MAX_SKEW_NS:
            self._offset_ns = offset_ns
        seconds = time.monotonic() if monotonic_s is None else monotonic_s
        return self._offset_ns + round(seconds * 1e9)


class Span:
    """One span, or none where nothing is traced. `end` it once; later calls do nothing."""

    def __init__(self, span: trace.Span, clock: SpanClock | None) -> None:
        self._span = span
        self._clock = clock

    @property
    def is_recording(self) -> bool:
        """Whether anybody will see it: worth computing attributes for."""
        return self._clock is not None and self._span.is_recording()

    @property
    def context(self) -> Context:
        """Makes this span the parent in `Tracing.begin`."""
        return trace.set_span_in_context(self._span)

    @property
    def link(self) -> trace.Link:
        """From another span to this one."""
        return trace.Link(self._span.get_span_context())

    @_harmless
    def set(self, attributes: Mapping[str, Value]) -> None:
        """Adds attributes, of those that its type declares."""
        if self.is_recording:
            self._span.set_attributes(attributes)

    @_harmless
    def fail(self, reason: str) -> None:
        """It ended with an error of ours; messages may quote a client, so they stay out."""
        if self.is_recording:
            self._span.set_attribute(ERROR_TYPE, reason)
            self._span.set_status(trace.StatusCode.ERROR)

    @_harmless
    def end(self, at: float | None = None) -> None:
        """Ends it at `at`, in seconds of time.monotonic; None is now."""
        if self._clock is not None and self._span.is_recording():
            self._span.end(self._clock.at(at))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Inside, it is the parent of new spans and of calls to other processes."""
        if self._clock is None:
            yield
            return
        token = otel.attach(self.context)
        try:
            yield
        finally:
            otel.detach(token)


NO_SPAN = Span(trace.INVALID_SPAN, None)


class Tracing:
    """Makes a process's spans; with no tracer, NO_SPAN."""

    def __init__(self, tracer: trace.Tracer | None) -> None:
        self._tracer = tracer
        self._clock = SpanClock()

    @property
    def is_on(self) -> bool:
        """Whether spans are exported."""
        return self._tracer is not None

    def here(self) -> Span:
        """The span that is current."""
        return Span(trace.get_current_span(), self._clock) if self.is_on else NO_SPAN

    def begin(
        self,
        span_type: SpanType,
        *,
        at: float | None = None,
        parent: Context | None = None,
        links: Sequence[trace.Link] = (),
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        """A span from `at` (seconds of time.monotonic, None is now), under `parent` or the current.

        Does not make it current; see `Span.current` and `span`.
        """
        if self._tracer is None:
            return NO_SPAN
        try:
            span = self._tracer.start_span(
                span_type.name,
                parent,
                span_type.kind,
                {**span_type.fixed, **(attributes or {})},
                links,
                self._clock.at(at),
            )
        except Exception:  # the same promise as _harmless
            log.debug("a span is lost", exc_info=True)
            return NO_SPAN
        return Span(span, self._clock)

    def record(
        self,
        span_type: SpanType,
        *,
        began_at: float,
        ended_at: float,
        parent: Context | None = None,
        links: Sequence[trace.Link] = (),
        attributes: Mapping[str, Value] | None = None,
    ) -> None:
        """A span that is over."""
        self.begin(span_type, at=began_at, parent=parent, links=links, attributes=attributes).end(
            ended_at
        )

    @contextlib.contextmanager
    def span(
        self,
        span_type: SpanType,
        *,
        parent: Context | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> Iterator[Span]:
        """A span around what is inside, and current there."""
        if self._tracer is None:
            yield NO_SPAN
            return
        span = self.begin(span_type, parent=parent, attributes=attributes)
        try:
            with span.current():
                yield span
        finally:
            span.end()


def _offset_ns() -> int:
    return time.time_ns() - time.monotonic_ns()
