"""The servicer edge: one interceptor that continues traces and maps exceptions to rich status.

Owns what happens around a handler's call. Adds nothing per message: a streaming handler's generator
is consumed here exactly as grpc itself would do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import context as otel
from opentelemetry.context import Context

from mesh.errors import Unavailable, domain_error, invalid, to_rpc_status
from mesh.spans import ERROR_TYPE, RPC_STATUS, server_call
from mesh.telemetry import Telemetry
from mesh.tracing import NO_SPAN, Span

# Calls that live as long as a process, or are asked for every second, are no part of a trace.
_UNTRACED = (
    "/kvmesh.v1.StatusService/",
    "/kvmesh.v1.DecodeService/Session",
    "/kvmesh.v1.KvStoreService/Watch",
)
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
                    response = await inner(_checked(request), context)
                    span.set({RPC_STATUS: grpc.StatusCode.OK.name})
                    return response
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
                    else:
                        await _write_all(responses, context)
                    span.set({RPC_STATUS: grpc.StatusCode.OK.name})
                except (Exception, asyncio.CancelledError) as error:
                    await _fail(context, span, error)

        return handle

    def _span(self) -> contextlib.AbstractContextManager[Span]:
        tracing = self._telemetry.tracing
        quiet = not tracing.is_on and not self._traceparent
        if quiet or self._method.startswith(_UNTRACED):
            return contextlib.nullcontext(NO_SPAN)
        parent = self._telemetry.context(self._traceparent)
        if tracing.is_on:
            return tracing.span(server_call(self._method), parent=parent)
        return _within(parent)


@contextlib.contextmanager
def _within(parent: Context | None) -> Iterator[Span]:
    """The caller's trace passes through to whoever is called inside."""
    token = otel.attach(parent or Context())
    try:
        yield NO_SPAN
    finally:
        otel.detach(token)


async def _write_all(responses: Any, context: Any) -> None:
    write = context.write
    async with contextlib.aclosing(responses):
        async for response in responses:
            await write(response)


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


async def _fail(context: Any, span: Span, error: BaseException) -> None:
    """Ends the call with the status of `error`; always raises."""
    if isinstance(error, asyncio.CancelledError) and _is_cancelled_from_outside():
        span.set({RPC_STATUS: grpc.StatusCode.CANCELLED.name})
        raise error  # the caller is gone or the server stops: grpc answers by itself
    if isinstance(error, grpc.aio.AbortError):
        span.set({RPC_STATUS: _code_name(context)})
        raise error  # the handler chose its own status
    if isinstance(error, grpc.aio.InternalError):
        await _end_broken(context, error)
    known = domain_error(error)
    span.set({RPC_STATUS: known.code.name, ERROR_TYPE: known.reason})
    if known.code in _OUR_FAULT:
        span.fail(known.reason)
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
