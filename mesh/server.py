"""The gRPC server of a process: error mapping, trace continuation, health and reflection.

Owns the server's life. A handler raises domain errors; the interceptor turns them into rich status once,
around the whole call, never per message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace

from mesh.channel import MAX_MESSAGE_BYTES
from mesh.errors import KvmeshError, from_rpc_error, to_rpc_status
from mesh.process import StartupError
from mesh.telemetry import Telemetry

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNTRACED = ("/kvmesh.v1.StatusService/", "/kvmesh.v1.DecodeService/")


class ServiceServer:
    """A grpc.aio server with kvmesh's manners. Health names: "liveness", "readiness", each service, ""."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        telemetry: Telemetry,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        self._server = grpc.aio.server(interceptors=[_Manners(telemetry)], options=options)
        self._host, self._port = host, port
        self._health = health.aio.HealthServicer()
        self._services: list[str] = []
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(
        self, register: Callable[[Any, grpc.aio.Server], None], servicer: object, service_name: str
    ) -> None:
        """Adds a service before start."""
        register(servicer, self._server)
        self._services.append(service_name)

    async def start(self) -> int:
        """Binds and serves; returns the port. A taken port is a StartupError."""
        reflection.enable_server_reflection(
            [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        address = f"{self._host}:{self._port}"
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address}: is the port taken?") from error
        await self._health.set("liveness", _SERVING)
        self.set_ready(False)
        await self._server.start()
        return port

    def set_ready(self, ready: bool) -> None:
        """Turns readiness, "" and every service's health."""
        state = _SERVING if ready else _NOT_SERVING
        for name in ("", "readiness", *self._services):
            asyncio.ensure_future(self._health.set(name, state))

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives live ones grace_s seconds, then cancels them."""
        await self._server.stop(grace_s)


class _Manners(grpc.aio.ServerInterceptor):
    """Continues traces and maps exceptions, once per call."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        traceparent = dict(handler_call_details.invocation_metadata or ()).get("traceparent", "")
        call = _Call(self._telemetry, method, str(traceparent))
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            wrapped = call.stream(inner)
        else:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrapped = call.unary(inner)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


class _Call:
    """One call's wrapper."""

    def __init__(self, telemetry: Telemetry, method: str, traceparent: str) -> None:
        self._telemetry = telemetry
        self._method = method
        self._traceparent = traceparent

    def _span(self) -> Any:
        if self._method.startswith(_UNTRACED):
            return trace.use_span(trace.INVALID_SPAN)
        return self._telemetry.tracer.start_as_current_span(
            self._method.removeprefix("/kvmesh.v1."),
            context=self._telemetry.context(self._traceparent),
            kind=trace.SpanKind.SERVER,
        )

    def unary(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a handler with one response."""

        async def handle(request: Any, context: Any) -> Any:
            with self._span():
                try:
                    return await inner(request, context)
                except (KvmeshError, grpc.RpcError, Exception) as error:
                    await _abort(context, error)

        return handle

    def stream(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a handler with many responses."""

        async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
            responses = inner(request, context)
            with self._span():
                try:
                    async for response in responses:
                        yield response
                except (KvmeshError, grpc.RpcError, Exception) as error:
                    await _abort(context, error)
                finally:
                    await responses.aclose()

        return handle


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    await context.abort_with_status(to_rpc_status(error))
