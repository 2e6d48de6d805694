"""The servicer edge: one interceptor that continues traces and maps exceptions to rich status.

Owns what happens around a handler's call. Adds nothing per message: a streaming handler's generator
is consumed here exactly as grpc itself would do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import trace

from mesh.errors import Unavailable, domain_error, invalid, to_rpc_status
from mesh.telemetry import Telemetry

# Calls that live as long as a process, or are asked for every second, are no part of a trace.
_UNTRACED = (
    "/kvmesh.v1.StatusService/",
    "/kvmesh.v1.DecodeService/Session",
    "/kvmesh.v1.KvStoreService/Watch",
)
_SPAN_NAMES = {
    "/kvmesh.v1.GenerationService/Generate": "Generate",
    "/kvmesh.v1.PrefillService/Prefill": "prefill",
}
_OUR_FAULT = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.DATA_LOSS,
    }
)
log = logging.getLogger("kvmesh.server")
Handler = Callable[[Any, Any], Awaitable[Any]]


class ServicerEdge(grpc.aio.ServerInterceptor):
    """Wraps every kvmesh handler; health and reflection pass untouched."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """The handler, wrapped for this call."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        call = _Call(self._telemetry, method, _traceparent(handler_call_details))
        if handler.request_streaming and handler.response_streaming:
            make, inner = (
                grpc.stream_stream_rpc_method_handler,
                call.streaming(handler.stream_stream),
            )
        elif handler.response_streaming:
            make, inner = grpc.unary_stream_rpc_method_handler, call.streaming(handler.unary_stream)
        elif handler.request_streaming:
            make, inner = grpc.stream_unary_rpc_method_handler, call.unary(handler.stream_unary)
        else:
            make, inner = grpc.unary_unary_rpc_method_handler, call.unary(handler.unary_unary)
        deserializer = handler.request_deserializer
        if deserializer is not None and not handler.request_streaming:
            deserializer = functools.partial(_parsed, deserializer)
        return make(inner, deserializer, handler.response_serializer)


class _Call:
    """One call: its span and its way out."""

    def __init__(self, telemetry: Telemetry, method: str, traceparent: str) -> None:
        self._telemetry = telemetry
        self._method = method
        self._traceparent = traceparent

    def unary(self, inner: Handler) -> Handler:
        """Wraps a handler with one response."""

        async def handle(request: Any, context: Any) -> Any:
            with self._span() as span:
                try:
                    return await inner(_checked(request), context)
                except (Exception, asyncio.CancelledError) as error:
                    await _fail(context, span, error)

        return handle

    def streaming(self, inner: Callable[[Any, Any], Any]) -> Handler:
        """Wraps a handler with many responses: an async generator, or one that writes itself."""

        async def handle(request: Any, context: Any) -> None:
            with self._span() as span:
                try:
                    responses = inner(_checked(request), context)
                    if not hasattr(responses, "aclose"):
                        await responses
                        return
                    write = context.write
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            await write(response)
                except (Exception, asyncio.CancelledError) as error:
                    await _fail(context, span, error)

        return handle

    def _span(self) -> contextlib.AbstractContextManager[trace.Span]:
        quiet = not self._telemetry.is_enabled and not self._traceparent
        if quiet or self._method.startswith(_UNTRACED):
            return contextlib.nullcontext(trace.INVALID_SPAN)
        name = _SPAN_NAMES.get(self._method, self._method.removeprefix("/kvmesh.v1."))
        return self._telemetry.tracer.start_as_current_span(
            name,
            context=self._telemetry.context(self._traceparent),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": self._method.removeprefix("/")},
            record_exception=False,
            set_status_on_exception=False,
        )


@dataclass(frozen=True, slots=True)
class _Malformed:
    """In place of a request that could not be parsed: grpc has no status for that."""

    error: Exception


def _parsed(deserializer: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserializer(data)
    except Exception as error:  # protobuf's own kind of error differs by implementation
        return _Malformed(error)


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise invalid("request", f"cannot be parsed: {request.error}")
    return request


async def _fail(context: Any, span: trace.Span, error: BaseException) -> None:
    """Ends the call with the status of `error`; always raises."""
    if isinstance(error, asyncio.CancelledError) and _is_cancelled_from_outside():
        span.set_attribute("rpc.response.status_code", grpc.StatusCode.CANCELLED.name)
        raise error  # the caller is gone or the server stops: grpc answers by itself
    if isinstance(error, grpc.aio.AbortError):
        span.set_attribute("rpc.response.status_code", _code_name(context))
        raise error  # the handler chose its own status
    if isinstance(error, grpc.aio.InternalError):
        await _end_broken(context, error)
    known = domain_error(error)
    span.set_attribute("rpc.response.status_code", known.code.name)
    span.set_attribute("error.type", known.reason)
    if known.code in _OUR_FAULT:
        span.set_status(trace.StatusCode.ERROR, str(known))
    if context.done():
        raise asyncio.CancelledError from error
    await context.abort_with_status(to_rpc_status(known))


async def _end_broken(context: Any, error: BaseException) -> None:
    """Ends a call whose write failed: its caller is gone, or grpc itself refused the message."""
    log.debug("a response could not be sent", exc_info=error)
    with contextlib.suppress(grpc.aio.InternalError):
        await context.abort_with_status(to_rpc_status(Unavailable("the response was not sent")))
    raise asyncio.CancelledError from error


def _is_cancelled_from_outside() -> bool:
    # A CancelledError that merely leaks from an inner task would leave the caller without a status.
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _code_name(context: Any) -> str:
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else str(code)


def _traceparent(details: Any) -> str:
    for key, value in details.invocation_metadata or ():
        if key == "traceparent" and isinstance(value, str):
            return value
    return ""
