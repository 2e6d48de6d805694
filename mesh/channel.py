"""Client channels between kvmesh processes: keepalive, sizes, no hidden retries, trace context.

Owns channel options and the interceptor that carries the trace; callers own deadlines and retries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from mesh.telemetry import Telemetry

MAX_MESSAGE_BYTES = 64 * 2**20
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str, telemetry: Telemetry | None = None) -> grpc.aio.Channel:
    """An insecure channel to host:port (private network only); traces continue through it."""
    interceptors: list[grpc.aio.ClientInterceptor] = []
    if telemetry is not None:
        interceptors = [_UnaryTrace(telemetry), _StreamTrace(telemetry)]
    return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=interceptors)


class _Trace:
    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def _details(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        traceparent = self._telemetry.traceparent()
        if not traceparent:
            return details
        metadata = grpc.aio.Metadata(*(details.metadata or ()), ("traceparent", traceparent))
        return grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )


class _UnaryTrace(_Trace, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._details(client_call_details), request)


class _StreamTrace(_Trace, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._details(client_call_details), request)
