"""Client channels between kvmesh processes: keepalive, sizes, no hidden retries, trace context.

Owns channel options and carrying the trace. Callers own deadlines, retries and the channel's life.
"""

from __future__ import annotations

from typing import Any

import grpc

from mesh.telemetry import Telemetry

MAX_MESSAGE_BYTES = 64 * 2**20
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that hangs without closing its socket is noticed after 10 + 5 s, also between calls.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Also the limit of one connection attempt: long enough for a busy host.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    # Channels to one address share no connection and no back-off.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str, telemetry: Telemetry | None = None) -> grpc.aio.Channel:
    """An insecure channel to host:port (private network only); connects on first use.

    With `telemetry`, every call carries the traceparent of the span current when it is made; that
    costs nothing per message.
    """
    channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    return channel if telemetry is None else _TracedChannel(channel, telemetry)


class _TracedChannel(grpc.aio.Channel):
    """Adds metadata where a call is made: grpc's interceptors would wrap every message too."""

    def __init__(self, channel: grpc.aio.Channel, telemetry: Telemetry) -> None:
        self._channel = channel
        self._telemetry = telemetry

    async def __aenter__(self) -> _TracedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _TracedCallable(self._channel.unary_unary(*args, **kwargs), self._telemetry)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _TracedCallable(self._channel.unary_stream(*args, **kwargs), self._telemetry)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _TracedCallable(self._channel.stream_unary(*args, **kwargs), self._telemetry)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _TracedCallable(self._channel.stream_stream(*args, **kwargs), self._telemetry)


class _TracedCallable(
    grpc.aio.UnaryUnaryMultiCallable,
    grpc.aio.UnaryStreamMultiCallable,
    grpc.aio.StreamUnaryMultiCallable,
    grpc.aio.StreamStreamMultiCallable,
):
    """A stub method of any arity."""

    def __init__(self, inner: Any, telemetry: Telemetry) -> None:
        self._inner = inner
        self._telemetry = telemetry

    def __call__(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        traceparent = self._telemetry.traceparent()
        if traceparent:
            metadata = (*(metadata or ()), ("traceparent", traceparent))
        return self._inner(*args, metadata=metadata, **kwargs)
